"""Between real values and codes, and from one scale to another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.integer.bounds import check_codes
from fxquant.integer.rounding import (
    along_dimension,
    centered,
    float32_scalar,
    to_codes,
)


def quantize(
    x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype
) -> Tensor:
    """``q = clamp(round_half_even(x · (1/s)) + z, qmin, qmax)``.

    ``x`` is float32 of any shape. Both the inverse and the product are rounded to float32. A NaN
    counts as 0, because what a NaN becomes as an integer differs between processors.
    """
    inverse = float32_scalar(1.0) / float32_scalar(scale)
    real = x.to(torch.float32) * inverse
    real = real.nan_to_num_(0.0, math.inf, -math.inf)
    return to_codes(real, zero_point, qmin, qmax, dtype)


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """``x = float32(q − z) · float32(s)``: float32 of ``q``'s shape."""
    check_codes("dequantize", q)
    return centered(q, zero_point).mul_(float32_scalar(scale))


def dequantize_weight(
    weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, axis: int
) -> Tensor:
    """``w = float32(q_w − z_w) · s_w`` with one scale for each index of ``axis``.

    A scale (and zero point) of shape [1] is the whole tensor's, whatever ``axis`` is.
    """
    check_codes("dequantize_weight", weight)
    wide = weight.to(torch.float32)
    if weight_zero_point is not None:
        shift = weight_zero_point.to(torch.float32)
        wide = wide - along_dimension(shift, weight.dim(), axis)
    return wide * along_dimension(weight_scale.to(torch.float32), weight.dim(), axis)
