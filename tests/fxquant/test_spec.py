from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import RecipeError
from fxquant.simulate.observers.ranges import qparams_from_range
from fxquant.spec import OBSERVERS, QParams, QuantSpec


def qparams(
    scale: float = 0.5, zero_point: int = 3, qmin: int = 0, qmax: int = 255, **more: Any
) -> QParams:
    return QParams(
        scale=torch.tensor([scale]),
        zero_point=torch.tensor([zero_point], dtype=torch.int32),
        qmin=qmin,
        qmax=qmax,
        dtype=more.pop("dtype", torch.uint8),
        **more,
    )


# -- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "codes", "dtype"),
    [
        (QuantSpec(bits=8), (0, 255), torch.uint8),
        (QuantSpec(bits=4), (0, 15), torch.uint8),
        (QuantSpec(bits=8, reduce_range=True), (0, 255), torch.uint8),
        (QuantSpec(bits=16, scheme="symmetric"), (-32767, 32767), torch.int16),
        (QuantSpec(bits=8, scheme="symmetric", kind="weight"), (-127, 127), torch.int8),
        (QuantSpec(bits=4, scheme="symmetric", kind="weight"), (-7, 7), torch.int8),
        (QuantSpec(bits=4, scheme="affine", kind="weight"), (-8, 7), torch.int8),
        (QuantSpec(scheme="symmetric", kind="weight", reduce_range=True), (-63, 63), torch.int8),
    ],
)
def test_codes_of_a_spec(spec: QuantSpec, codes: tuple[int, int], dtype: torch.dtype) -> None:
    assert (spec.qmin, spec.qmax) == codes
    assert spec.dtype == dtype


def test_reduce_range_fits_an_activation_to_one_bit_less() -> None:
    spec = QuantSpec(bits=8, reduce_range=True)
    assert (spec.fit_qmin, spec.fit_qmax) == (0, 127)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "activation bits must be 2 to 8 or 16, got 9"),
        ({"bits": 16, "kind": "weight"}, "weight bits must be 2 to 8, got 16"),
        ({"bits": True}, "bits must be"),
        ({"bits": 16}, "16-bit activations are symmetric"),
        ({"scheme": "linear"}, "scheme must be"),
        ({"granularity": "per_channel"}, "activations are quantized per_tensor"),
        ({"kind": "weight", "one_sided": True}, "one_sided is for activations"),
        ({"bits": 2, "reduce_range": True}, "reduce_range needs at least 3 bits"),
        ({"observer": "histgram"}, "did you mean 'histogram'"),
        ({"options": {"percentile": 99}}, "observer 'mse' has no option 'percentile'"),
        ({"observer": "p_norm", "options": {"p": 0}}, "options.p must lie between 0.1 and 16"),
        ({"observer": "p_norm_2.4", "options": {"p": 2.0}}, "already says p = 2.4"),
        ({"options": {"bins": 1000}}, "power of two"),
        ({"options": {"bins": 4096.0}}, "must be an integer"),
    ],
)
def test_refuses_a_spec(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantSpec(**changes)


def test_shorthand_says_the_exponent() -> None:
    spec = QuantSpec(observer="p_norm_2.4")
    assert spec.estimator == "p_norm"
    assert spec.option("p") == 2.4


def test_options_have_defaults_that_are_allowed() -> None:
    for name, options in OBSERVERS.items():
        for option, rule in options.items():
            assert rule.complaint(QuantSpec(observer=name).option(option)) is None


def test_equal_specs_have_equal_hashes() -> None:
    assert hash(QuantSpec(options={"bins": 1024, "candidates": 8})) == hash(  # type: ignore[arg-type]
        QuantSpec(options=(("candidates", 8), ("bins", 1024)))
    )


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "positive and finite"),
        ({"scale": float("nan")}, "positive and finite"),
        ({"zero_point": 256}, "lie outside"),
        ({"qmax": 256}, "do not fit"),
    ],
)
def test_refuses_parameters(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qparams(**changes)


def test_rounds_half_to_even_and_clamps() -> None:
    x = torch.tensor([0.25, 0.75, -0.25, 1000.0, -1000.0])
    assert qparams().quantize(x).tolist() == [3, 5, 3, 255, 0]


def test_multiplies_by_the_float32_reciprocal() -> None:
    parameters = qparams(scale=0.1, zero_point=0)
    x = torch.arange(0, 20, 0.05)
    inverse = torch.tensor(1.0) / torch.tensor(0.1)
    assert torch.equal(parameters.quantize(x), torch.round(x * inverse).to(torch.uint8))


def test_channels_lie_along_the_axis() -> None:
    scale = torch.tensor([0.5, 0.25, 2.0])
    zeros = torch.zeros(3, dtype=torch.int32)
    parameters = QParams(scale, zeros, -127, 127, torch.int8, axis=1)
    x = torch.randn(2, 3, 4)
    for channel in range(3):
        alone = QParams(scale[channel : channel + 1], zeros[:1], -127, 127, torch.int8)
        assert torch.equal(parameters.quantize(x)[:, channel], alone.quantize(x[:, channel]))
        assert torch.equal(
            parameters.fake_quantize(x)[:, channel], alone.fake_quantize(x[:, channel])
        )


SPECS = st.sampled_from(
    [
        QuantSpec(bits=bits, scheme=scheme, one_sided=one_sided)
        for bits, scheme, one_sided in (
            (8, "affine", False),
            (8, "symmetric", False),
            (8, "affine", True),
            (4, "affine", False),
            (3, "affine", True),
            (2, "symmetric", False),
            (16, "symmetric", False),
        )
    ]
    + [
        QuantSpec(bits=bits, scheme=scheme, kind="weight")
        for bits in (8, 4, 2)
        for scheme in ("symmetric", "affine")
    ]
)
BOUNDS = st.floats(2.0**-40, 2.0**40, width=32)


@given(spec=SPECS, below=BOUNDS, above=BOUNDS)
@settings(max_examples=200, deadline=None)
def test_quantization_is_a_projection_that_keeps_zero(
    spec: QuantSpec, below: float, above: float
) -> None:
    below = 0.0 if spec.one_sided else below
    parameters = qparams_from_range(spec, *(torch.tensor([v]).double() for v in (-below, above)))
    x = torch.linspace(-below, above, 301)
    q = parameters.quantize(x)
    y = parameters.dequantize(q)
    assert torch.equal(parameters.quantize(y), q)
    assert torch.equal(parameters.fake_quantize(x), y)
    assert parameters.quantize(torch.zeros(1)).item() == parameters.zero_point.item()
    assert parameters.fake_quantize(torch.zeros(1)).item() == 0.0
    # Half a step, and what float32 loses in x / s, which counts up to 32,767 steps.
    half = parameters.scale.item() * (0.5 + 32767 * 2.0**-22)
    assert float((y.double() - x.double()).abs().max()) <= half
