"""Rounding to a grid with gradients to the value and to the step: all training goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["memory_format", "straight_through"]

# A large tensor is taken in slices that stay in a core's cache: each of the half a dozen
# operations on it would else read and write all of it in main memory.
_SLICE = 32768


def straight_through(
    x: Tensor, step: Tensor, low: float | Tensor, high: float | Tensor, gradient_scale: float = 1.0
) -> Tensor:
    """``step·clamp(round(x / step), low, high)`` with gradients to `x` and `step`.

    `step` broadcasts over `x`; `low` and `high` are the codes' bounds less the zero point. With
    v = x / step, dy/dx = 1 within half a step of the bounds and 0 outside (the straight-through
    estimator, Bengio et al. 2013); dy/dstep = round(v) − v inside, and the bound outside (LSQ,
    Esser et al., ICLR 2020, equation 3), times `gradient_scale`. Of x's dtype; forward the bits
    of `QParams.fake_quantize`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or step.requires_grad):
        return cast(Tensor, _StraightThrough.apply(x, step, low, high, gradient_scale))
    return _rounded(x, step, low, high)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Any, high: Any, gradient_scale: float
    ) -> Tensor:
        # The value alone is kept: what made it keeps it as well, and the rest is quickly redone.
        ctx.save_for_backward(x, step)
        ctx.bounds, ctx.gradient_scale = (low, high), gradient_scale
        return _rounded(x, step, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        low, high = ctx.bounds
        wants_step = ctx.needs_input_grad[1]
        if _sliced(x, step):
            gradient = gradients[0].contiguous(memory_format=memory_format(x))
            to_x, to_step = _backward_in_slices(x, step, low, high, gradient, wants_step)
        else:
            to_x, to_step = _backward(x, step, low, high, gradients[0], wants_step)
        if to_step is not None:
            to_step = to_step * ctx.gradient_scale
        return to_x, to_step, None, None, None


def _sliced(x: Tensor, step: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    dense = x.is_contiguous(memory_format=memory_format(x))
    return plain and dense and step.numel() == 1 and x.numel() > _SLICE


def _rounded(x: Tensor, step: Tensor, low: Any, high: Any) -> Tensor:
    # In the order of QParams.fake_quantize. Codes without the zero point are small integers, so
    # that leaving it out changes no bit.
    x, step = x.detach(), step.detach()
    inverse = torch.reciprocal(step)
    if not _sliced(x, step):
        steps = (x.to(torch.float32) * inverse).round_().clamp_(low, high)
        return steps.mul_(step).to(x.dtype)
    y = torch.empty_like(x)
    for values, result in zip(_slices(x), _slices(y), strict=True):
        torch.mul(values, inverse, out=result)
        result.round_().clamp_(low, high).mul_(step)
    return y


def _backward(
    x: Tensor, step: Tensor, low: Any, high: Any, gradient: Tensor, wants_step: bool
) -> tuple[Tensor, Tensor | None]:
    v = x.to(torch.float32) * torch.reciprocal(step)
    inside = (v > low - 0.5) & (v < high + 0.5)
    to_step = None
    if wants_step:
        slope = v.round().clamp_(low, high).sub_(v * inside)
        to_step = (gradient.to(torch.float32) * slope).sum_to_size(step.shape)
    return gradient * inside, to_step


def _backward_in_slices(
    x: Tensor, step: Tensor, low: float, high: float, gradient: Tensor, wants_step: bool
) -> tuple[Tensor, Tensor | None]:
    inverse = torch.reciprocal(step)
    to_x, total = torch.empty_like(x), torch.zeros(())
    room, more_room = torch.empty(_SLICE), torch.empty(_SLICE)
    # Its derivative has the bounds that ours has, and one pass.
    mask = torch.ops.aten.hardtanh_backward.grad_input
    for values, slope, result in zip(_slices(x), _slices(gradient), _slices(to_x), strict=True):
        v, inner = room[: len(values)], more_room[: len(values)]
        torch.mul(values, inverse, out=v)
        mask(slope, v, low - 0.5, high + 0.5, grad_input=result)
        if wants_step:
            mask(v, v, low - 0.5, high + 0.5, grad_input=inner)
            total += torch.dot(slope, v.round_().clamp_(low, high).sub_(inner))
    return to_x, total.reshape(step.shape) if wants_step else None


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where the values lie so and not otherwise."""
    last = torch.channels_last
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _slices(x: Tensor) -> Sequence[Tensor]:
    """Parts of a dense tensor's values, as they lie in memory."""
    lies = x if memory_format(x) is torch.contiguous_format else x.permute(0, 2, 3, 1)
    return torch.split(lies.view(-1), _SLICE)
