"""Operators that work on each element by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.bounds import check_codes
from fxquant.integer.rounding import (
    along_dimension,
    centered,
    channel_memory_format,
    float32_scalar,
    rescale_factor,
    to_codes,
)


def add(
    a: Tensor,
    a_scale: float,
    a_zero_point: int,
    b: Tensor,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """``round_half_even(float32(q_a − z_a) · m_a + float32(q_b − z_b) · m_b) + z``, clamped.

    ``m_a = float32(s_a / s_y)``. Both products and the sum are rounded to float32, in this order.
    The operands broadcast.
    """
    check_codes("add", a, dtype)
    check_codes("add", b)
    left = centered(a, a_zero_point).mul_(rescale_factor(a_scale, scale))
    right = centered(b, b_zero_point).mul_(rescale_factor(b_scale, scale))
    return to_codes(left + right, zero_point, qmin, qmax, dtype)


def mul(
    a: Tensor,
    a_scale: float,
    a_zero_point: int,
    b: Tensor,
    b_scale: float,
    b_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """``round_half_even(float32((q_a − z_a)(q_b − z_b)) · m) + z``, clamped.

    ``m = float32(s_a · s_b / s_y)``; the integer product is exact. The operands broadcast.
    """
    check_codes("mul", a, dtype)
    check_codes("mul", b)
    # A product of two 16-bit operands needs 33 bits.
    wide = torch.int64 if torch.int16 in (a.dtype, b.dtype) else torch.int32
    product = (a.to(wide) - a_zero_point) * (b.to(wide) - b_zero_point)
    real = product.to(torch.float32).mul_(float32_scalar(a_scale * b_scale / scale))
    return to_codes(real, zero_point, qmin, qmax, dtype)


def channel_affine(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """A batch norm that stands alone: ``y = w_c · x + b_c`` over dimension 1 of [N, C, ...].

    ``round_half_even(float32(q_x − z_x) · m_c + b'_c) + z`` with ``m_c = float32(s_x · w_c / s_y)``
    and ``b'_c = float32(b_c / s_y)``, both computed in float64; ``weight`` and ``bias`` are
    float32 [C].
    """
    check_codes("channel_affine", x, dtype)
    factors = (weight.to(torch.float64) * x_scale / scale).to(torch.float32)
    offsets = (bias.to(torch.float64) / scale).to(torch.float32)
    real = centered(x, x_zero_point).mul_(along_dimension(factors, x.dim(), 1))
    real = real.add_(along_dimension(offsets, x.dim(), 1))
    return to_codes(real, zero_point, qmin, qmax, dtype)


def lookup(x: Tensor, table: Tensor) -> Tensor:
    """``table[q]`` for each uint8 code of ``x``; ``table`` is uint8 [256] (see `build_table`)."""
    if x.dtype != torch.uint8 or table.dtype != torch.uint8 or tuple(table.shape) != (256,):
        raise CompileError(
            f"fxquant.lookup: takes uint8 codes and a uint8[256] table, not {x.dtype} codes and "
            f"a {table.dtype}{list(table.shape)} table; requantize to 8 bits first"
        )
    # index_select on the flat codes is 3 to 7 times faster than indexing with the whole tensor.
    channels_last = channel_memory_format(x) != torch.contiguous_format
    codes = x.movedim(1, -1) if channels_last else x
    result = table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
    return result.movedim(-1, 1) if channels_last else result
