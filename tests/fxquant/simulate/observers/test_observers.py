"""What holds for every range estimator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.simulate.observers import make_observer, weight_qparams
from fxquant.spec import OBSERVERS, QParams, QuantSpec

NAMES = sorted(OBSERVERS)
SEARCHES = ("histogram", "mse", "p_norm")


def observe(spec: QuantSpec, *batches: Tensor, name: str = "") -> QParams:
    observer = make_observer(spec, name=name)
    for batch in batches:
        observer.update(batch)
    return observer.qparams()


def weight_spec(name: str, **changes: Any) -> QuantSpec:
    defaults: dict[str, Any] = {"scheme": "symmetric", "granularity": "per_channel"}
    return QuantSpec(observer=name, kind="weight", **(defaults | changes))


def squared_error(x: Tensor, parameters: QParams) -> float:
    return float((parameters.fake_quantize(x) - x).double().square().sum())


# -- every estimator -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_covers_the_bulk_of_the_values(name: str) -> None:
    x = torch.randn(4, 1000)
    low, high = observe(QuantSpec(observer=name), x).range()
    assert -8 < float(low) < -1.5
    assert 1.5 < float(high) < 8


# The searches look closer at a single tensor; their channels have a test of their own.
@pytest.mark.parametrize("name", [name for name in NAMES if "bins" not in OBSERVERS[name]])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("bits", [4, 8])
def test_per_channel_is_per_tensor_channel_by_channel(name: str, scheme: Any, bits: int) -> None:
    weight = torch.randn(5, 3, 3, 3) * torch.rand(5, 1, 1, 1)
    spec = weight_spec(name, scheme=scheme, bits=bits)
    together = weight_qparams(weight, spec)
    for channel in range(5):
        alone = weight_qparams(weight[channel : channel + 1], spec)
        assert torch.equal(together.scale[channel], alone.scale[0])
        assert torch.equal(together.zero_point[channel], alone.zero_point[0])


@pytest.mark.parametrize("name", NAMES)
def test_per_channel_does_not_depend_on_the_other_channels(name: str) -> None:
    weight = torch.randn(6, 30) * torch.tensor([1e-6, 1.0, 5.0, 1e4, 0.1, 1.0]).unsqueeze(1)
    together = weight_qparams(weight, weight_spec(name))
    pair = weight_qparams(weight[[3, 1]], weight_spec(name))
    assert torch.equal(together.scale[[3, 1]], pair.scale)


@pytest.mark.parametrize("name", NAMES)
def test_axis_says_where_the_channels_are(name: str) -> None:
    weight = torch.randn(4, 6, 3)
    spec = weight_spec(name)
    moved = weight_qparams(weight.movedim(0, 1), spec, axis=1)
    assert moved.axis == 1
    assert torch.equal(moved.scale, weight_qparams(weight, spec).scale)


@pytest.mark.parametrize("name", [name for name in NAMES if "moving" not in name])
@pytest.mark.parametrize("one_sided", [False, True])
def test_batches_do_not_matter(name: str, one_sided: bool) -> None:
    x = torch.randn(12, 50).abs() if one_sided else torch.randn(12, 50)
    spec = QuantSpec(observer=name, one_sided=one_sided)
    whole = observe(spec, x)
    for batches in (x.split(5), tuple(reversed(x.split(1)))):
        parts = observe(spec, *batches)
        assert torch.equal(whole.scale, parts.scale)
        assert torch.equal(whole.zero_point, parts.zero_point)


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_does_not_matter(name: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    plain = observe(QuantSpec(observer=name), x)
    channels_last = observe(QuantSpec(observer=name), x.to(memory_format=torch.channels_last))
    assert torch.equal(plain.scale, channels_last.scale)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 8),
        torch.full((2, 8), 3.0),
        torch.full((2, 8), -3.0),
        torch.tensor([[7.0]]),
        torch.full((2, 8), 3e38),
        torch.tensor([[-3e38, 3e38]]),
        torch.full((2, 8), 1e-42),
        torch.full((2, 8), -1e-20),
    ],
    ids=lambda x: f"{x.flatten()[0]:g}",
)
@pytest.mark.parametrize("bits", [2, 8])
def test_degenerate_values(name: str, x: Tensor, bits: int) -> None:
    for spec in (
        QuantSpec(bits=bits, observer=name),
        QuantSpec(bits=bits, observer=name, scheme="symmetric"),
        QuantSpec(bits=bits, observer=name, one_sided=float(x.min()) >= 0),
    ):
        parameters = observe(spec, x)
        assert bool(torch.isfinite(1 / parameters.scale).all())
        assert parameters.fake_quantize(torch.zeros(1)).item() == 0
    parameters = weight_qparams(x, weight_spec(name, bits=bits))
    assert bool(torch.isfinite(parameters.fake_quantize(x)).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_is_kept(name: str) -> None:
    x = torch.full((2, 8), 3.0)
    parameters = observe(QuantSpec(observer=name, one_sided=True), x)
    torch.testing.assert_close(parameters.fake_quantize(x), x, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_values_that_are_not_finite(name: str, bad: float) -> None:
    x = torch.randn(2, 3, 4)
    x[0, 1, 2] = bad
    with pytest.raises(CalibrationError, match=r"the values of 'layer1' hold 1 NaN or infinite"):
        observe(QuantSpec(observer=name), x, name="layer1")
    with pytest.raises(CalibrationError, match=r"'conv.weight' hold 1 NaN"):
        weight_qparams(x, weight_spec(name), name="conv.weight")


@pytest.mark.parametrize("name", NAMES)
def test_refuses_negative_values_where_none_were_promised(name: str) -> None:
    with pytest.raises(CalibrationError, match="one-sided"):
        observe(QuantSpec(observer=name, one_sided=True), torch.tensor([[-0.1, 1.0]]))


@pytest.mark.parametrize("name", NAMES)
def test_refuses_to_guess_from_nothing(name: str) -> None:
    with pytest.raises(CalibrationError, match="never seen"):
        observe(QuantSpec(observer=name), torch.empty(0, 3))


@pytest.mark.parametrize("name", NAMES)
def test_may_become_one_sided_after_it_saw_values(name: str) -> None:
    x = torch.rand(4, 100)
    observer = make_observer(QuantSpec(observer=name))
    observer.update(x)
    observer.spec = replace(observer.spec, one_sided=True)
    expected = observe(QuantSpec(observer=name, one_sided=True), x)
    assert torch.equal(observer.qparams().scale, expected.scale)
    assert int(observer.qparams().zero_point) == 0


@pytest.mark.parametrize("name", NAMES)
def test_16_bits_lose_next_to_nothing(name: str) -> None:
    x = torch.randn(4, 1000)
    parameters = observe(QuantSpec(bits=16, scheme="symmetric", observer=name), x)
    inside = x.abs() < 2
    error = (parameters.fake_quantize(x) - x)[inside].abs().max()
    assert float(error) < 1e-3


def test_a_per_channel_spec_needs_channels() -> None:
    with pytest.raises(ValueError, match="number of channels"):
        make_observer(weight_spec("min_max"))


def test_refuses_other_channels_than_before() -> None:
    observer = make_observer(weight_spec("min_max"), 3)
    observer.update(torch.randn(3, 2))
    with pytest.raises(CalibrationError, match="4 channels, before they had 3"):
        observer.update(torch.randn(4, 2))


# -- extremes ------------------------------------------------------------------------------------


def test_min_max_reaches_the_extremes() -> None:
    low, high = observe(QuantSpec(observer="min_max"), torch.tensor([[-1.0, 3.0]])).range()
    assert float(low) == pytest.approx(-1.0, abs=0.01)
    assert float(high) == pytest.approx(3.0, abs=0.01)


def test_min_max_widens_to_zero() -> None:
    low, high = observe(QuantSpec(observer="min_max"), torch.tensor([[2.0, 3.0]])).range()
    assert float(low) == 0
    assert float(high) == pytest.approx(3.0)


def test_abs_max_is_mirrored() -> None:
    low, high = observe(QuantSpec(observer="abs_max"), torch.tensor([[-1.0, 3.0]])).range()
    assert float(low) == pytest.approx(-3.0, abs=0.02)
    assert float(high) == pytest.approx(3.0, abs=0.02)


def test_moving_average_keeps_its_momentum() -> None:
    spec = QuantSpec(observer="moving_average_min_max", options=(("momentum", 0.75),))
    batches = torch.tensor([[-1.0, 1.0]]), torch.tensor([[-5.0, 3.0]])
    observer = make_observer(spec)
    for batch in batches:
        observer.update(batch)
    low, high = observer.range()
    assert float(low) == pytest.approx(-2.0)
    assert float(high) == pytest.approx(1.5)


def test_moving_average_abs_max_follows_the_larger_side() -> None:
    spec = QuantSpec(observer="moving_average_abs_max", options=(("momentum", 0.5),))
    observer = make_observer(spec)
    observer.update(torch.tensor([[-4.0, 1.0]]))
    observer.update(torch.tensor([[-1.0, 2.0]]))
    assert float(observer.range()[1]) == pytest.approx(3.0)


# -- distributions -------------------------------------------------------------------------------


def test_percentile_leaves_out_its_share() -> None:
    x = torch.arange(10_000.0).reshape(1, -1)
    spec = QuantSpec(observer="percentile", options=(("percentile", 90.0),), one_sided=True)
    observer = make_observer(spec)
    observer.update(x)
    assert float(observer.range()[1]) == pytest.approx(9_000, abs=8)


def test_percentile_cuts_both_tails_of_an_affine_range() -> None:
    spec = QuantSpec(observer="percentile", options=(("percentile", 99.0),))
    observer = make_observer(spec)
    observer.update(torch.linspace(-1, 3, 10_001).reshape(1, -1))
    low, high = observer.range()
    assert float(low) == pytest.approx(-0.96, abs=0.005)
    assert float(high) == pytest.approx(2.96, abs=0.005)


def test_percentile_100_is_the_extreme() -> None:
    spec = QuantSpec(observer="percentile", options=(("percentile", 100.0),), scheme="symmetric")
    observer = make_observer(spec)
    observer.update(torch.tensor([[-7.0, 1.0]]))
    assert float(observer.range()[1]) == 7.0


def test_entropy_ignores_a_lonely_outlier() -> None:
    x = torch.randn(100_000).abs()
    x[0] = 30.0
    observer = make_observer(QuantSpec(observer="entropy", bits=4, one_sided=True))
    observer.update(x)
    assert 2 < float(observer.range()[1]) < 10


# -- searches ------------------------------------------------------------------------------------


def heavy_tailed(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * torch.randn(rows, columns).exp()


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_search_beats_min_max_on_weights(name: str, bits: int, scheme: Any) -> None:
    weight = heavy_tailed(8, 200)
    options = {"p": 2.0} if name == "p_norm" else {}
    searched = weight_qparams(
        weight, weight_spec(name, bits=bits, scheme=scheme, options=tuple(options.items()))
    )
    plain = weight_qparams(weight, weight_spec("min_max", bits=bits, scheme=scheme))
    before = (plain.fake_quantize(weight) - weight).square().sum(1)
    after = (searched.fake_quantize(weight) - weight).square().sum(1)
    # The search adds errors up in float32.
    assert bool((after <= before * (1 + 1e-5)).all())


@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([2, 3, 4, 8]),
    shift=st.floats(-2, 2),
    scale=st.floats(1e-3, 1e3),
)
@settings(max_examples=20, deadline=None)
def test_mse_is_never_worse_than_min_max_up_to_the_bins(
    seed: int, bits: int, shift: float, scale: float
) -> None:
    torch.manual_seed(seed)
    x = (heavy_tailed(1, 3000) + shift) * scale
    searched = observe(QuantSpec(bits=bits, options=(("cap", 0.0),)), x)
    plain = observe(QuantSpec(bits=bits, observer="min_max"), x)
    # Values are known to a bin: the root of the mean error may be off by its width, max / 1024.
    width = float(x.abs().max()) / 1024
    root = (squared_error(x, searched) / x.numel()) ** 0.5
    assert root <= (squared_error(x, plain) / x.numel()) ** 0.5 + width


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["mse", "histogram"])
def test_search_finds_the_best_of_a_dense_grid(name: str, bits: int) -> None:
    x = torch.randn(1, 50_000).relu()
    spec = QuantSpec(bits=bits, observer=name, one_sided=True, options=(("cap", 0.0),))
    found = squared_error(x, observe(spec, x))
    peak = float(x.max())
    best = min(
        squared_error(x, observe(replace(spec, observer="abs_max", options=()), x.clamp(max=bound)))
        for bound in torch.linspace(0.05, 1, 64).mul(peak).tolist()
    )
    assert found <= best * 1.005


def test_short_channels_find_a_scale_that_meets_their_values() -> None:
    weight = torch.randn(64, 9)
    errors = [
        squared_error(weight, weight_qparams(weight, weight_spec(name)))
        for name in ("mse", "min_max")
    ]
    assert errors[0] < 0.6 * errors[1]


def test_larger_exponents_clip_less() -> None:
    x = heavy_tailed(1, 20_000)
    tops = [
        float(observe(QuantSpec(bits=4, observer=name, options=(("cap", 0.0),)), x).range()[1])
        for name in ("p_norm_1.0", "p_norm_2.0", "p_norm_4.0")
    ]
    assert tops == sorted(tops)
    assert tops[0] < tops[-1]


def test_mse_is_the_norm_with_exponent_2() -> None:
    x = heavy_tailed(2, 1000)
    mse, norm = (observe(QuantSpec(observer=name), x) for name in ("mse", "p_norm_2.0"))
    assert torch.equal(mse.scale, norm.scale)
    assert torch.equal(mse.zero_point, norm.zero_point)


def test_affine_search_finds_the_zero_point_of_shifted_values() -> None:
    x = torch.rand(1, 5000) * 3 - 1
    parameters = observe(QuantSpec(bits=8), x)
    low, high = parameters.range()
    assert float(low) == pytest.approx(-1, abs=0.03)
    assert float(high) == pytest.approx(2, abs=0.03)


def test_long_channels_are_searched_through_histograms() -> None:
    weight = torch.randn(2, 5000)
    long = weight_qparams(weight, weight_spec("mse", bits=4))
    short = weight_qparams(weight, weight_spec("mse", bits=4, options=(("bins", 8192),)))
    errors = [squared_error(weight, parameters) for parameters in (long, short)]
    assert errors[0] == pytest.approx(errors[1], rel=0.002)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_range_is_capped_by_the_mean_image(name: str) -> None:
    x = torch.rand(50, 200)
    x[7, 3] = 100.0
    capped = observe(QuantSpec(observer=name, one_sided=True), x)
    free = observe(QuantSpec(observer=name, one_sided=True, options=(("cap", 0.0),)), x)
    assert float(capped.range()[1]) < 7
    assert float(free.range()[1]) > 20


@pytest.mark.parametrize("name", SEARCHES)
def test_what_many_images_reach_is_not_cut(name: str) -> None:
    # A quarter of the images go to 10, the others to 1: the mean extreme is 3.25.
    x = torch.rand(40, 5000)
    x[::4, 0] = 10.0
    observer = make_observer(QuantSpec(observer=name, one_sided=True))
    observer.update(x)
    assert float(observer.limits()[1]) == 10.0


@pytest.mark.parametrize("name", SEARCHES)
def test_what_many_values_reach_is_not_cut(name: str) -> None:
    # Few values an image, as in a small head: the largest of four says little about the next image.
    x = torch.randn(250, 4).abs()
    observer = make_observer(QuantSpec(observer=name, one_sided=True))
    observer.update(x)
    assert float((x > observer.limits()[1]).double().mean()) <= 1e-3


def test_a_small_operand_does_not_cut_a_large_one() -> None:
    large, small = torch.rand(50, 200) * 10, torch.rand(50, 200)
    observer = make_observer(QuantSpec(observer="mse", one_sided=True))
    for batch in range(5):
        part = slice(10 * batch, 10 * batch + 10)
        observer.update(large[part], source=0)
        for source in range(1, 9):
            observer.update(small[part], source=source)
    assert float(observer.limits()[1]) == float(large.max())
