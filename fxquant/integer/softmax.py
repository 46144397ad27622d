"""Softmax over the last dimension on integers: I-ViT's, FQ-ViT's, and a table's.

Each of them sees an input only by its distance ``d = max − q ≥ 0`` from the maximum of its row, of
which codes have at most 256 (65536 with 16 bits): the exponentials are a table over d.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.accumulators import WIDE, in_chunks
from fxquant.integer.bounds import INT32_LIMIT, check_codes
from fxquant.integer.rounding import centered_as

_EXP_ONE = 2.0**16
_LOG_A, _LOG_B, _LOG_C = 0.35815147, 0.96963238, 1.0
_LOG_LIMIT = 2**52


def distances(dtype: torch.dtype) -> Tensor:
    """Every distance that two codes of a type can have, as int64."""
    return torch.arange(65536 if dtype == torch.int16 else 256)


def shift_exp(distances: Tensor, x0: int, n: int) -> Tensor:
    """I-ViT's shift-exp ``E(−d; S, n) ≈ exp(−d·S) · 2^n / S`` of int64 distances ``d ≥ 0``.

    ``x0 = ⌊−1/S⌋``. ``p = I + (I>>1) − (I>>4)`` with I = −d, not below ``n·x0``; ``q = ⌊p/x0⌋``,
    ``r = p − x0·q``; ``E = ⌊(r/2 − x0) · 2^(n−q)⌋``, where r/2 is not rounded. E is between 1 and
    ``−x0 · 2^n``, which must be an int32, or CompileError is raised.
    """
    if x0 >= 0 or not 0 <= n <= 30 or -x0 << n > INT32_LIMIT:
        raise CompileError(
            f"shift-exp needs x0 < 0, 0 <= n <= 30 and -x0 · 2^n < 2^31, not x0 = {x0}, n = {n}; "
            "take both from shiftmax_constants or shift_gelu_constants"
        )
    p = -distances
    p = (p + (p >> 1) - (p >> 4)).clamp_(min=n * x0)
    q = torch.div(p, x0, rounding_mode="floor")
    r = p - x0 * q
    return ((r - 2 * x0) << (n - q)) >> 1


def shiftmax_constants(scale: float, row_length: int) -> tuple[int, int]:
    """``(x0, n)`` of `softmax_i_vit`: the largest n ≤ 15 with ``−x0 · 2^n · N < 2^31``."""
    return shift_exp_constants(scale, row_length, 15)


def shift_exp_constants(scale: float, summands: int, n: int) -> tuple[int, int]:
    """``x0 = ⌊−1/S⌋`` and the largest exponent up to ``n`` with ``−x0 · 2^n · summands < 2^31``."""
    x0 = math.floor(-1 / scale) if scale > 2.0**-31 else -(2**31)
    while n >= 0 and (-x0 << n) * summands > INT32_LIMIT:
        n -= 1
    if n < 0:
        raise CompileError(
            f"the scale {scale} is too fine for shift-exp over {summands} summands; use fewer bits"
        )
    return x0, n


def softmax_i_vit(
    x: Tensor, x_zero_point: int, x0: int, n: int, bits: int, mask: Tensor | None
) -> Tensor:
    """I-ViT's Shiftmax over the last dimension of codes; the zero point cancels.

    ``e = E(I − max)``, ``T = min(Σe, 2^31 − 1)``, ``F = ⌊(2^31 − 1)/T⌋`` and
    ``⌊e · F / 2^(32−bits)⌋`` of scale 2^-(bits−1) and zero point 0: uint8 up to 8 bits, int16 up
    to 16. Positions where ``mask`` (bool, broadcast) is False take no part and give 0, and a row
    without any other is all 0. Source: Li and Gu, ICCV 2023.
    """
    dtype = _output_dtype("softmax_i_vit", bits)
    check_codes("softmax_i_vit", x)
    table = shift_exp(distances(x.dtype), x0, n).to(torch.int32)
    fits = (-x0 << n) * x.shape[-1] <= INT32_LIMIT

    def normalize(e: Tensor) -> Tensor:
        total = e.sum(-1, keepdim=True, dtype=torch.int32 if fits else torch.int64)
        factor = torch.full_like(total, INT32_LIMIT) // total.clamp(1, INT32_LIMIT)
        # e ≤ T, so that e · F is an int32.
        shares: Tensor = e.mul_(factor) >> (32 - bits)
        return shares.to(dtype)

    return _softmax(x, table, mask, normalize)


def exp_table(scale: float) -> Tensor:
    """``round(2^16 · exp(−d · S))`` for the distances 0 … 255 of 8-bit codes: int32 [256]."""
    steps = torch.arange(256, dtype=torch.float64) * -scale
    return (steps.exp() * _EXP_ONE).round().to(torch.int32)


def softmax_table(
    x: Tensor,
    table: Tensor,
    numerator: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    mask: Tensor | None,
) -> Tensor:
    """Softmax over the last dimension with a table of exponentials and no approximation of them.

    ``x`` is uint8 or int8, ``table`` int32 [256] without negative entries (see `exp_table`).
    ``e = table[max − q]``, ``T = Σe``, and the codes ``clamp(⌊e · numerator / (256 · T) + ½⌋)``
    with ``numerator = round(256 / s_y)`` and zero point 0. The mask is that of `softmax_i_vit`.
    """
    check_codes("softmax_table", x, dtype)
    if x.dtype == torch.int16 or table.dtype != torch.int32 or tuple(table.shape) != (256,):
        raise CompileError(
            f"fxquant.softmax_table: takes 8-bit codes and an int32[256] table, not {x.dtype} "
            f"codes and a {table.dtype}{list(table.shape)} table; requantize to 8 bits first"
        )
    # ⌊a/b⌋ of integers is ⌊fl(a/b)⌋ in float64 while a < 2^53: a quotient that is no integer is
    # at least 1/b away from one, and its rounding error is at most a/b · 2^-53.
    largest = int(table.max()) * (2 * numerator + 256 * x.shape[-1])
    if int(table.min()) < 0 or numerator <= 0 or largest >= 2**53:
        raise CompileError(
            f"fxquant.softmax_table: needs entries >= 0, and a numerator > 0 with "
            f"max · (2 · numerator + 256 · {x.shape[-1]}) < 2^53, not {numerator}"
        )

    def normalize(e: Tensor) -> Tensor:
        total = e.sum(-1, keepdim=True)
        quotient = e.mul_(2 * numerator).add_(total * 256).div_((total * 512).clamp_(min=1))
        return quotient.floor_().clamp_(qmin, qmax).to(dtype)

    return _softmax(x, table.to(torch.float64), mask, normalize)


def log_softmax_constants(scale: float, row_length: int) -> tuple[int, int, int, int]:
    """``(x0, b, c, n)`` of `softmax_log2`: the largest n ≤ 30 that keeps the sums below 2^52.

    ``x0 = ⌊−0.6931/S⌋``, ``b = ⌊(0.96963238/a)/S⌋``, ``c = ⌊(1/a)/S²⌋`` with a = 0.35815147. A
    coarse scale has c = 1 at least, so that no exponential vanishes.
    """
    x0 = math.floor(-0.6931 / scale)
    b = math.floor(_LOG_B / _LOG_A / scale)
    c = max(math.floor(_LOG_C / _LOG_A / scale**2), 1)
    n = 30
    while n >= 0 and (c << n) * row_length >= _LOG_LIMIT:
        n -= 1
    if n < 0:
        raise CompileError(f"the scale {scale} is too fine for log-int-softmax; use fewer bits")
    return x0, b, c, n


def softmax_log2(
    x: Tensor,
    x_zero_point: int,
    x0: int,
    b: int,
    c: int,
    n: int,
    bits: int,
    mask: Tensor | None,
) -> Tensor:
    """FQ-ViT's log-int-softmax as the powers of two ``2^(15−Q)``: int16 of scale 2^-15.

    The product with V is then a shift of each element. Q = 0 gives 32767, the largest int16, and
    0 stands for what `log_int_softmax` leaves out. The mask is that of `softmax_i_vit`.
    """
    q = log_int_softmax(x, x_zero_point, x0, b, c, n, bits, mask)
    return log_values(bits).index_select(0, q.reshape(-1)).reshape(x.shape)


def log_values(bits: int) -> Tensor:
    """What `softmax_log2` gives for each exponent Q, and 0 for 2^bits: int16 [2^bits + 1]."""
    values = [min(2 ** (15 - exponent), 32767) for exponent in range(2**bits)]
    return torch.tensor([*values, 0], dtype=torch.int16)


def log_exponentials(distances: Tensor, x0: int, b: int, c: int, n: int) -> tuple[Tensor, Tensor]:
    """``max(0, r(r + b) + c)`` and the shift ``n − q`` that makes e of it, for int64 distances."""
    z = (-distances).clamp_(min=n * x0)
    q = torch.div(z, x0, rounding_mode="floor")
    r = z - q * x0
    return (r * (r + b) + c).clamp_(min=0), n - q


def log_int_softmax(
    x: Tensor,
    x_zero_point: int,
    x0: int,
    b: int,
    c: int,
    n: int,
    bits: int,
    mask: Tensor | None = None,
) -> Tensor:
    """The exponents Q of FQ-ViT's log-int-softmax, value 2^-Q: int64; 2^bits stands for 0.

    ``z = max(I − max, n·x0)``, ``q = ⌊z/x0⌋``, ``r = z − q·x0``,
    ``e = max(0, (r(r + b) + c) · 2^(n−q))``, ``ρ = round_half_even(Σe/e)`` and
    ``L = ⌊log₂ρ⌋``, plus 1 if ``ρ − 2^L ≥ 2^(L−1)``. From L = 2^bits on the value is 0. Bits are at
    most 4, the exponents of an int16. Source: Lin et al., IJCAI 2022.
    """
    if not 1 <= bits <= 4:
        raise CompileError(f"fxquant.softmax_log2: its exponents have 1 to 4 bits, not {bits}")
    if x0 >= 0 or not 0 <= n <= 30:
        raise CompileError(f"fxquant.softmax_log2: needs x0 < 0 and 0 <= n <= 30, not {x0} and {n}")
    check_codes("softmax_log2", x)
    table, shifts = log_exponentials(distances(x.dtype), x0, b, c, n)
    if (int(table.max()) << n) * x.shape[-1] >= _LOG_LIMIT:
        raise CompileError(
            f"fxquant.softmax_log2: n = {n} lets a row of {x.shape[-1]} reach 2^52; take the "
            "constants from log_softmax_constants"
        )
    table = (table << shifts).to(torch.float64)

    def normalize(e: Tensor) -> Tensor:
        # Rounds like the exact quotient: Σe < 2^52, so that a quotient that is no tie is further
        # from one (1/(2e)) than its rounding error. Nothing over nothing is no number: 0.
        ratio = torch.div(e.sum(-1, keepdim=True), e).round_().nan_to_num_(nan=torch.inf)
        # Exponent and first bit of the mantissa of a float64, and that bit rounds the exponent.
        rounded = (ratio.view(torch.int64) >> 51).add_(1).bitwise_right_shift_(1).sub_(1023)
        return rounded.clamp_(max=2**bits)

    return _softmax(x, table, mask, normalize)


def _output_dtype(operator: str, bits: int) -> torch.dtype:
    if not 2 <= bits <= 16:
        raise CompileError(f"fxquant.{operator}: an output has 2 to 16 bits, not {bits}")
    return torch.uint8 if bits <= 8 else torch.int16


def _softmax(
    x: Tensor, table: Tensor, mask: Tensor | None, normalize: Callable[[Tensor], Tensor]
) -> Tensor:
    """``normalize`` of the table's entries at each row's distances, 0 where the mask is False."""
    if mask is not None and mask.dtype != torch.bool:
        raise CompileError(f"a softmax's mask is {mask.dtype}; it must be bool, True takes part")
    length = x.shape[-1]
    if not x.numel():
        return normalize(table.new_empty(x.shape))

    def compute(rows: Tensor, taking_part: Tensor | None) -> Tensor:
        above = centered_as(rows, torch.iinfo(x.dtype).min, torch.int32)
        # Multiplying by the mask is many times faster than filling, and codes above 0 allow it.
        seen = above if taking_part is None else above * taking_part
        distances = seen.amax(-1, keepdim=True) - above
        if taking_part is None:
            return normalize(table.index_select(0, distances.reshape(-1)).reshape(rows.shape))
        e = table.index_select(0, distances.clamp_(min=0).reshape(-1)).reshape(rows.shape)
        return normalize(e.mul_(taking_part))

    rows_of_mask = None if mask is None else mask.expand(x.shape).reshape(-1, length)
    result = in_chunks(
        x.reshape(-1, length), rows_of_mask, torch.contiguous_format, WIDE * length, compute
    )
    return result.reshape(x.shape)
