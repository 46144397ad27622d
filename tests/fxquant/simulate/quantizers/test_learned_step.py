from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.simulate.quantizers.learned_step import LearnedStep, can_learn
from fxquant.spec import QuantSpec


def frozen(x: Tensor, *, channelwise: bool = False, **options: object) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(QuantSpec(**options), channelwise=channelwise)  # type: ignore[arg-type]
    quantizer.observing = True
    quantizer(x)
    quantizer.freeze()
    return quantizer


def positive() -> Tensor:
    return torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("one_sided", [True, False])
def test_yields_the_same_bits_as_the_quantizer(bits: int, one_sided: bool) -> None:
    x = positive() if one_sided else torch.randn(2, 3, 4, 4)
    quantizer = frozen(x, bits=bits, one_sided=one_sided)
    learned = LearnedStep(quantizer)
    assert torch.equal(learned(x), quantizer(x))
    with torch.no_grad():
        learned.scale.mul_(1.37)
    learned.follow()
    assert torch.equal(learned(x), quantizer(x))


@pytest.mark.parametrize("one_sided", [True, False])
def test_gradients_are_those_of_lsq(one_sided: bool) -> None:
    x = (positive() if one_sided else torch.randn(2, 3, 4, 4)) * 1.5
    quantizer = frozen(x / 1.5, bits=4, one_sided=one_sided, observer="min_max")
    learned = LearnedStep(quantizer)
    grid = quantizer.qparams
    z, scale = int(grid.zero_point), float(grid.scale)
    x.requires_grad_()
    upstream = torch.randn_like(x)
    learned(x).backward(upstream)
    to_scale = 0.0
    for value, gradient in zip(x.detach().flatten(), upstream.flatten(), strict=True):
        v = float(value) / scale
        code = round(v) + z
        slope = round(v) - v
        if code < 0:
            slope = -z
        elif code > 15:
            slope = 15 - z
        to_scale += float(gradient) * slope
    factor = 1 / math.sqrt(x[0].numel() * (15 - z))
    assert learned.scale.grad is not None
    assert float(learned.scale.grad) == pytest.approx(to_scale * factor, rel=1e-3)
    codes = (x.detach() / scale).round() + z
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * ((codes >= 0) & (codes <= 15)))


def test_stays_positive() -> None:
    learned = LearnedStep(frozen(positive(), bits=4))
    with torch.no_grad():
        learned.scale.fill_(-1.0)
    learned.follow()
    assert float(learned.learned_qparams().scale) > 0


def test_the_quantizer_follows_what_is_learned() -> None:
    learned = LearnedStep(frozen(positive(), bits=4))
    with torch.no_grad():
        learned.scale.mul_(1.5)
    learned.follow()
    assert torch.equal(learned.source.qparams.scale, learned.scale.detach())


def test_leaves_channelwise_wide_and_unfrozen_quantizers_alone() -> None:
    x = positive()
    refused = [
        frozen(x, bits=8, one_sided=True, channelwise=True),
        frozen(x, bits=16, scheme="symmetric"),
        ActivationQuantizer(QuantSpec(bits=4)),
    ]
    for quantizer in refused:
        assert not can_learn(quantizer)
        with pytest.raises(ValueError, match="one scale"):
            LearnedStep(quantizer)
