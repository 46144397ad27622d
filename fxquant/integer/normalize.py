"""Division by the Euclidean norm on integers, for cosine attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.bounds import check_codes, largest_operand
from fxquant.integer.roots import FACTOR_BITS, inverse_root

_OUTPUT_BITS = 15
NORMALIZE_SCALE = 2.0**-_OUTPUT_BITS
"""The scale of what `normalize_integer` returns."""


def normalize_integer(x: Tensor, x_zero_point: int, dim: int) -> Tensor:
    """``y/‖y‖₂`` along ``dim`` for ``y = q − z``: int16 of scale 2^-15, a row of zeros gives 0.

    ``(f, e) = inverse_root(Σy²)`` and ``min(round_half_even(y · f / 2^(e−15)), 32767)``. It differs
    from ``2^15 · y/‖y‖`` by less than ``½ + 2^-5.9``, and by less than 1 at ±1. Raises CompileError
    where a sum of squares could reach 2^53.
    """
    check_codes("normalize_integer", x)
    largest = largest_operand(x.dtype, x_zero_point)
    if x.shape[dim] * largest**2 >= 2**53 or largest >= 2 ** (53 - FACTOR_BITS):
        raise CompileError(
            f"fxquant.normalize_integer: {x.shape[dim]} values of {x.dtype} are too many to square"
        )
    values = x.to(torch.float64).sub_(x_zero_point)
    factor, exponent = inverse_root((values * values).sum(dim, keepdim=True).to(torch.int64))
    # |y| < 2^31 and f ≤ 2^22: every product is below 2^53, and the powers of two are exact.
    scaled = factor / (torch.ones_like(exponent) << (exponent - _OUTPUT_BITS)).to(torch.float64)
    return values.mul_(scaled).round_().clamp_(-32767, 32767).to(torch.int16)
