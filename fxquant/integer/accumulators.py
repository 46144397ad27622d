"""What follows the sum in a convolution or a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.bounds import check_codes
from fxquant.integer.rounding import (
    along_dimension,
    centered,
    channel_factors,
    rescale_factor,
    to_codes,
)


def finish(
    accumulator: Tensor,
    axis: int,
    x_scale: float,
    weight_scale: Tensor,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    residual: Tensor | None,
    residual_scale: float,
    residual_zero_point: int,
) -> Tensor:
    """Rescale ``float32(a)`` by each channel's multiplier, add the residual, round and clamp.

    ``accumulator`` is float32 with its channels in dimension ``axis``; it is overwritten.
    ``dtype=torch.float32`` returns ``float32(a) · float32(s_x · s_w)`` instead of codes.
    """
    as_codes = dtype != torch.float32
    factors = channel_factors(x_scale, weight_scale, scale if as_codes else None)
    real = accumulator.mul_(along_dimension(factors, accumulator.dim(), axis))
    if not as_codes:
        return real
    if residual is not None:
        factor = rescale_factor(residual_scale, scale)
        real = real.add_(centered(residual, residual_zero_point).mul_(factor))
    return to_codes(real, zero_point, qmin, qmax, dtype)


def check_call(operator: str, x: Tensor, dtype: torch.dtype, residual: Tensor | None) -> None:
    """Raise CompileError for a call that has no meaning, before any arithmetic."""
    if dtype == torch.float32:
        check_codes(operator, x)
        if residual is not None:
            raise CompileError(f"fxquant.{operator}: a float32 output takes no residual")
    else:
        check_codes(operator, x, dtype)
        if residual is not None:
            check_codes(operator, residual)
