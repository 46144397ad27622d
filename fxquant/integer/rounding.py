"""From exact integers to codes: the one float32 multiplication and rounding of every operator.

Every product is rounded to float32 on its own. The operations here are separate torch calls on
purpose: ``addcmul`` or a fused kernel may contract a·b + c into one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float32_scalar(value: float) -> Tensor:
    """``value`` rounded to float32, as a tensor of shape []."""
    return torch.tensor(value, dtype=torch.float64).to(torch.float32)


def rescale_factor(x_scale: float, scale: float) -> Tensor:
    """``float32(s_x / s_y)``, the division in float64: shape []."""
    return float32_scalar(x_scale / scale)


def channel_factors(x_scale: float, weight_scale: Tensor, scale: float | None) -> Tensor:
    """``float32(float64(s_x) · float64(s_w) / float64(s_y))``, of ``weight_scale``'s shape.

    Without ``scale`` it is ``float32(s_x · s_w)``, the value of one accumulator step.
    """
    product = weight_scale.to(torch.float64) * x_scale
    if scale is not None:
        product = product / scale
    return product.to(torch.float32)


def along_dimension(values: Tensor, dimensions: int, axis: int) -> Tensor:
    """Reshape [C] (or [1]) so that it broadcasts along ``axis`` of a tensor of that rank."""
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)


def centered(q: Tensor, zero_point: int) -> Tensor:
    """``float32(q − z)``: exact, the codes have at most 16 bits."""
    return q.to(torch.float32).sub_(zero_point)


def centered_as(q: Tensor, zero_point: int, dtype: torch.dtype) -> Tensor:
    """``q − z`` in a wider type, which the caller knows to hold it: a new tensor."""
    wide = q.to(dtype)
    return wide.sub_(zero_point) if zero_point else wide


def to_codes(real: Tensor, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """``clamp(round_half_even(real) + z, qmin, qmax)`` as ``dtype``; overwrites ``real``.

    ``real`` is a float32 tensor in steps of the output's scale. The clamp comes first, with
    shifted bounds, which is the same integer: after rounding ``real`` is an integer, the bounds
    and the sum are below 2^24, and nothing too large for an integer type is ever converted.
    """
    codes = real.round_().clamp_(qmin - zero_point, qmax - zero_point)
    return (codes.add_(zero_point) if zero_point else codes).to(dtype)


def channel_memory_format(x: Tensor) -> torch.memory_format:
    """The layout that an image-shaped result takes from ``x``: channels last, or contiguous."""
    # A slice of a channels-last tensor is dense in neither format but still has its channels last.
    if not x.is_contiguous() and x.dim() in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1:
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format
