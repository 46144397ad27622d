"""GELU on integers: I-ViT's ShiftGELU, ``x · σ(1.702 · x)``."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.accumulators import WIDE, in_chunks
from fxquant.integer.bounds import INT32_LIMIT, accumulator_dtype, check_codes, input_range
from fxquant.integer.rounding import centered_as
from fxquant.integer.softmax import shift_exp, shift_exp_constants


def shift_gelu_constants(scale: float, row_length: int = 1) -> tuple[int, int]:
    """``(x0, n)`` of `gelu_i_vit` for an input of that scale: ``x0 = ⌊−1/(1.702·S)⌋``, n ≤ 23.

    n is the largest with ``−x0 · 2^n · 2 < 2^31``; the length of a row plays no part.
    """
    return shift_exp_constants(1.702 * scale, 2, 23)


def gelu_i_vit(x: Tensor, x_zero_point: int, x0: int, n: int, bits: int) -> Tensor:
    """I-ViT's ShiftGELU of codes: ``I · σ`` of scale ``S · 2^-(bits−1)``; a row is the last dim.

    ``I = q − z``, ``M = max(row max, 0)``, ``e = E(I − M)``, ``e0 = E(−M)``,
    ``T = min(e + e0, 2^31 − 1)``, ``F = ⌊(2^31 − 1)/T⌋``, ``σ = ⌊e · F / 2^(32−bits)⌋`` with 2 to
    16 bits. int32, or int64 where ``x`` is int16. Source: Li and Gu, ICCV 2023.
    """
    check_codes("gelu_i_vit", x)
    if not 2 <= bits <= 16:
        raise CompileError(f"fxquant.gelu_i_vit: the sigmoid has 2 to 16 bits, not {bits}")
    low, high = input_range(x.dtype, x_zero_point)
    table = shift_exp(torch.arange(high - low + 1), x0, n).to(torch.int32)
    saturates = 2 * (-x0 << n) > INT32_LIMIT
    wide = accumulator_dtype(x.dtype)

    def compute(rows: Tensor, _: Tensor | None) -> Tensor:
        values = centered_as(rows, x_zero_point, torch.int32)
        top = values.amax(-1, keepdim=True).clamp_(min=0)
        e = table.index_select(0, (top - values).reshape(-1)).reshape(rows.shape)
        total = e.to(torch.float64).add_(table[top.to(torch.int64)])
        if saturates:
            total.clamp_(max=INT32_LIMIT)
        # Integers below 2^53: the quotient in float64 has the exact one's floor, to which the
        # conversion truncates (see `softmax_table`). e ≤ T, so that e · F is an int32.
        factor = torch.div(INT32_LIMIT, total).to(torch.int32)
        sigma = e.mul_(factor) >> (32 - bits)
        return values.to(wide).mul_(sigma)

    length = x.shape[-1]
    if not x.numel():
        return x.to(wide)
    result = in_chunks(x.reshape(-1, length), None, torch.contiguous_format, WIDE * length, compute)
    return result.reshape(x.shape)
