from __future__ import annotations

import math

import pytest
import torch

from fxquant.simulate.observers import weight_qparams
from fxquant.simulate.quantizers import straight_through as module
from fxquant.simulate.quantizers.straight_through import straight_through
from fxquant.spec import QuantSpec


def test_straight_through_gives_the_bits_of_the_plain_quantizer() -> None:
    weight = torch.randn(4, 3, 3, 3)
    qparams = weight_qparams(weight, QuantSpec(4, "symmetric", "per_channel", kind="weight"))
    step = qparams.aligned(qparams.scale, 4)

    found = straight_through(weight, step, qparams.qmin, qparams.qmax)

    assert torch.equal(found, qparams.fake_quantize(weight))


def test_gradients_of_a_straight_through_are_those_of_lsq() -> None:
    x = torch.tensor([-9.0, -0.6, 0.2, 0.7, 9.0], requires_grad=True)
    step = torch.tensor([0.5], requires_grad=True)

    straight_through(x, step, -2, 3, gradient_scale=0.1).sum().backward()

    v = torch.tensor([-1.2, 0.4, 1.4])
    inside = float((v.round() - v).sum())
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert math.isclose(float(step.grad), 0.1 * (-2 + inside + 3), rel_tol=1e-5)


@pytest.mark.parametrize("wants_step", [True, False])
def test_slices_give_what_the_whole_gives(
    wants_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = torch.randn(5, 7)
    upstream = torch.randn(5, 7)

    def run() -> tuple[torch.Tensor, ...]:
        x = start.clone().requires_grad_()
        step = torch.tensor([0.3], requires_grad=wants_step)
        y = straight_through(x, step, -3, 4, gradient_scale=0.5)
        y.backward(upstream)
        assert x.grad is not None
        return (y.detach(), x.grad) + ((step.grad,) if step.grad is not None else ())

    whole = run()
    monkeypatch.setattr(module, "_SLICE", 4)
    sliced = run()
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])
    assert len(whole) == len(sliced) == 2 + wants_step
    torch.testing.assert_close(whole[-1], sliced[-1])


def test_channels_last_values_are_rounded_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLICE", 64)
    x, gradient = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    step = torch.tensor([0.1])
    made = []
    for form in (torch.contiguous_format, torch.channels_last):
        value = x.contiguous(memory_format=form).detach().requires_grad_()
        y = straight_through(value, step, -4, 3)
        y.backward(gradient)
        assert value.grad is not None
        assert y.is_contiguous(memory_format=form)
        made.append((y.detach(), value.grad))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
