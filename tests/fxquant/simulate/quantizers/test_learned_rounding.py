from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.simulate.observers import weight_qparams
from fxquant.simulate.quantizers import RoundedWeightQuantizer
from fxquant.simulate.quantizers.learned_rounding import LearnedRounding
from fxquant.spec import QParams, QuantSpec

SCHEMES = [
    (scheme, granularity, observer)
    for scheme in ("symmetric", "affine")
    for granularity in ("per_tensor", "per_channel")
    for observer in ("abs_max", "p_norm_2.4")
]


def weight() -> Tensor:
    return torch.randn(6, 3, 3, 3) * torch.rand(6, 1, 1, 1).add(0.1)


def grid(w: Tensor, bits: int = 4, scheme: str = "symmetric", **options: str) -> QParams:
    spec = QuantSpec(bits=bits, scheme=scheme, kind="weight", **options)  # type: ignore[arg-type]
    return weight_qparams(w, spec, 0)


@pytest.mark.parametrize(("scheme", "granularity", "observer"), SCHEMES)
def test_starts_at_the_float_weight(scheme: str, granularity: str, observer: str) -> None:
    w = weight()
    qparams = grid(w, scheme=scheme, granularity=granularity, observer=observer)
    low, high = (qparams.aligned(bound, 4) for bound in qparams.range())
    soft = LearnedRounding(qparams, w)(w)
    torch.testing.assert_close(soft, w.clamp(low, high), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scheme", "granularity", "observer"), SCHEMES)
def test_untrained_hardens_to_the_nearest_codes(
    scheme: str, granularity: str, observer: str
) -> None:
    w = weight()
    qparams = grid(w, scheme=scheme, granularity=granularity, observer=observer)
    hard = LearnedRounding(qparams, w).harden()
    assert isinstance(hard, RoundedWeightQuantizer)
    assert torch.equal(hard.quantize(w), qparams.quantize(w))


def test_starts_from_codes_that_another_method_has_chosen() -> None:
    w = weight()
    qparams = grid(w)
    codes = (qparams.quantize(w) + torch.randint(-2, 3, w.shape)).clamp(qparams.qmin, qparams.qmax)
    codes = codes.to(torch.int8)
    assert torch.equal(LearnedRounding(qparams, w, codes).harden().codes, codes)


def test_extreme_roundings_stay_on_the_grid() -> None:
    w = weight() * 4
    qparams = grid(weight(), bits=2)
    for direction in (-9.0, 9.0):
        rounding = LearnedRounding(qparams, w)
        with torch.no_grad():
            rounding.V.fill_(direction)
        codes = rounding.harden().codes
        assert int(codes.min()) >= qparams.qmin
        assert int(codes.max()) <= qparams.qmax
        assert rounding.settled() == w.numel()
        torch.testing.assert_close(rounding(w), rounding.harden()(w))


def test_learns_only_to_round_up_or_down() -> None:
    w = weight()
    qparams = grid(w, observer="abs_max")
    scaled = w * qparams.aligned(qparams.inverse_scale, 4)
    for direction, rounded in ((-9.0, scaled.floor()), (9.0, scaled.floor() + 1)):
        rounding = LearnedRounding(qparams, w)
        with torch.no_grad():
            rounding.V.fill_(direction)
        wanted = rounded.clamp(qparams.qmin, qparams.qmax).to(torch.int8)
        assert torch.equal(rounding.quantize(w), wanted)


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_regularizer_has_the_gradient_of_its_formula(beta: float) -> None:
    w = weight()
    rounding = LearnedRounding(grid(w), w)
    with torch.no_grad():
        rounding.V.mul_(2)
    plain = (1 - (2 * rounding.share_up() - 1).abs().pow(beta)).sum()
    ours = rounding.regularizer(beta)
    torch.testing.assert_close(ours, plain)
    (wanted,) = torch.autograd.grad(plain, rounding.V)
    (found,) = torch.autograd.grad(ours, rounding.V)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_gradient_reaches_the_roundings_and_not_the_weight() -> None:
    w = weight().requires_grad_()
    rounding = LearnedRounding(grid(w), w)
    rounding(w).sum().backward()
    assert w.grad is None
    assert rounding.V.grad is not None
    assert bool((rounding.V.grad >= 0).all())
    assert bool((rounding.V.grad > 0).any())
