"""What follows the sum in a convolution or a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.bounds import FLOAT32_LIMIT, Bound, check_codes
from fxquant.integer.rounding import (
    along_dimension,
    centered,
    channel_factors,
    rescale_factor,
    to_codes,
)

WIDE = 8
"""How many times its elements a row counts in `in_chunks` where it has several buffers of 64 bits.

They should stay in the processor's cache.
"""
# Float buffers of more than a few megabytes are mapped anew for every use, page by page.
_ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Finish:
    """Add the bias, rescale by each channel's multiplier, add the residual, round and clamp.

    The channels are in dimension ``axis``. ``dtype=torch.float32`` gives
    ``float32(a) · float32(s_x · s_w)`` instead of codes.
    """

    axis: int
    bound: Bound
    bias: Tensor | None
    x_scale: float
    weight_scale: Tensor
    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: torch.dtype
    residual_scale: float
    residual_zero_point: int

    @cached_property
    def _factors(self) -> Tensor:
        scale = None if self.dtype == torch.float32 else self.scale
        return channel_factors(self.x_scale, self.weight_scale, scale)

    def __call__(self, sums: Tensor, residual: Tensor | None) -> Tensor:
        """Of exact sums without bias, in any type; they are overwritten."""
        real = self._accumulator(sums)
        real.mul_(along_dimension(self._factors, real.dim(), self.axis))
        if self.dtype == torch.float32:
            return real
        if residual is not None:
            factor = rescale_factor(self.residual_scale, self.scale)
            real.add_(centered(residual, self.residual_zero_point).mul_(factor))
        return to_codes(real, self.zero_point, self.qmin, self.qmax, self.dtype)

    def _accumulator(self, sums: Tensor) -> Tensor:
        """``float32(a)``: an accumulator beyond 2^24 is rounded once, with its bias."""
        if self.bias is not None:
            if sums.dtype == torch.float32 and self.bound.total >= FLOAT32_LIMIT:
                sums = sums.to(torch.float64)
            sums.add_(along_dimension(self.bias.to(sums.dtype), sums.dim(), self.axis))
        return sums.to(torch.float32)


def in_chunks(
    x: Tensor,
    residual: Tensor | None,
    layout: torch.memory_format,
    elements: int,
    compute: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """``compute(x, residual)`` on slices of dimension 0, one result in the given layout.

    ``elements`` is the size of the larger float tensor that one index of dimension 0 needs.
    """
    step = max(1, _ELEMENTS_AT_ONCE // max(1, elements))
    result: Tensor | None = None
    for start in range(0, max(1, x.shape[0]), step):
        rows = slice(start, start + step)
        part = compute(x[rows], None if residual is None else residual[rows])
        if step >= x.shape[0]:
            return part.contiguous(memory_format=layout)
        if result is None:
            shape = (x.shape[0], *part.shape[1:])
            result = torch.empty(shape, dtype=part.dtype, memory_format=layout)
        result[rows].copy_(part)
    assert result is not None
    return result


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
