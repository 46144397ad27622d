"""Multiplication of integers by ``m / 2^e``: what replaces every float multiplier.

    q = clamp(round_half_even((x − z_x) · m / 2^e) + z, qmin, qmax)

is exact. A product of up to 2^62 is one int64; a longer one, of an int64 accumulator, is split:

    x = x₁ · 2^a + x₀          0 ≤ x₀ < 2^a, a < e
    h = x₁ · m + ⌊x₀ · m / 2^a⌋    so that x · m = h · 2^a + t, 0 ≤ t < 2^a

and then x · m / 2^e rounds like (2h + [t > 0]) / 2^(e − a + 1): below a tie and its parity one bit
says all there is to know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.accumulators import WIDE, in_chunks

LARGEST_INPUT = 2**52
"""The largest magnitude of an input, less its zero point, that `rescale` takes."""
LARGEST_SHIFT = 62
LARGEST_RESULT = 2**33
"""Where the magnitude of a rescaled value saturates."""
LARGEST_PRODUCT = 2**62
"""From here on a product is split."""
_OUTPUTS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def dyadic(ratio: float) -> tuple[int, int]:
    """``(m, e)`` with ``ratio ≈ m / 2^e``: ``m = ⌊f · 2^31 + ½⌋``, ``e = 31 − E``.

    ``ratio = f · 2^E`` with f in [0.5, 1), so ``|m|`` has 31 bits and the relative error is at most
    2^-31. A negative ratio is the negated pair of its magnitude. A ratio below 2^-31 would need
    ``e > 62``: it has ``e = 62`` and fewer bits, or is 0. Raises CompileError from 2^31 on, and for
    what is no number.
    """
    multiplier, shift = dyadic_tensors(torch.tensor([ratio], dtype=torch.float64))
    return int(multiplier), int(shift)


def dyadic_tensors(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """`dyadic` of each element of a float64 tensor: two int64 tensors of its shape."""
    magnitudes = ratios.to(torch.float64).abs()
    if not bool((magnitudes < 2.0**31).all()):
        raise CompileError(
            f"a multiplier of {ratios.flatten().tolist()[:4]} is no m / 2^e with 0 <= e <= 62; "
            "check the scales: one of them is 0, infinite or out of all proportion"
        )
    _, exponents = torch.frexp(magnitudes)
    shifts = (31 - exponents.to(torch.int64)).clamp(max=LARGEST_SHIFT)
    # Powers of two: exact. `floor` and a comparison, as ½ might not fit below the last bit.
    scaled = magnitudes * (torch.ones_like(shifts) << shifts).to(torch.float64)
    floors = scaled.floor()
    multipliers = floors.to(torch.int64) + (scaled - floors >= 0.5)
    # f rounded up to 1: the same ratio in 31 bits.
    full = multipliers == 2**31
    multipliers, shifts = torch.where(full, 2**30, multipliers), shifts - full.to(torch.int64)
    if bool((shifts < 0).any()):
        raise CompileError("a multiplier of 2^31 is no m / 2^e with 0 <= e; check the scales")
    return torch.where(ratios < 0, -multipliers, multipliers), shifts


def rescale(
    x: Tensor,
    x_zero_point: int,
    multiplier: Tensor,
    shift: Tensor,
    axis: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """``clamp(round_half_even((x − z_x) · m / 2^e) + z, qmin, qmax)`` as ``dtype``.

    ``x`` holds codes or accumulators of any integer type with |x − z_x| ≤ 2^52, ``multiplier`` and
    ``shift`` int64 [1] or one for each index of ``axis``, |m| < 2^31 and 0 ≤ e ≤ 62. The output is
    uint8, int8, int16 or int32. Exact for all of them; raises CompileError for anything else.
    """
    _check_output("rescale", zero_point, qmin, qmax, dtype)
    largest = _largest_input("rescale", x, x_zero_point)
    channels = max(multiplier.numel(), shift.numel())
    if channels != 1 and not {multiplier.numel(), shift.numel()} <= {1, x.shape[axis]}:
        raise CompileError(
            f"fxquant.rescale: {multiplier.numel()} multipliers and {shift.numel()} shifts along "
            f"dimension {axis} of {list(x.shape)}"
        )

    def compute(part: Tensor, dimension: int) -> Tensor:
        factor = _Factor.of("rescale", multiplier, shift, part.dim(), dimension)
        rounded = _scaled(part, x_zero_point, largest, factor)
        return _finish(rounded, zero_point, qmin, qmax, dtype)

    if not x.numel() or not x.is_contiguous():
        return compute(x, axis)
    inner = x.shape[axis % x.dim() + 1 :].numel() if channels > 1 else 1
    result = in_chunks(
        x.reshape(-1, channels, inner),
        None,
        torch.contiguous_format,
        WIDE * channels * inner,
        lambda part, _: compute(part, 1),
    )
    return result.reshape(x.shape)


def add_rescaled(
    a: Tensor,
    a_zero_point: int,
    a_multiplier: int,
    a_shift: int,
    b: Tensor,
    b_zero_point: int,
    b_multiplier: int,
    b_shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """``clamp(rescaled a + rescaled b + z, qmin, qmax)``; each branch is rounded on its own.

    A branch is ``round_half_even((q − z) · m / 2^e)``, saturated at ±2^33. The operands are those
    of `rescale` and broadcast. Source: I-ViT's residual addition.
    """
    _check_output("add_rescaled", zero_point, qmin, qmax, dtype)
    branches = []
    for x, x_zero_point, multiplier, shift in (
        (a, a_zero_point, a_multiplier, a_shift),
        (b, b_zero_point, b_multiplier, b_shift),
    ):
        pair = torch.tensor([multiplier]), torch.tensor([shift])
        factor = _Factor.of("add_rescaled", *pair, x.dim(), -1)
        largest = _largest_input("add_rescaled", x, x_zero_point)
        branches.append(_scaled(x, x_zero_point, largest, factor))
    left, right = branches
    total = left.add_(right) if left.shape == right.shape else left + right
    return _finish(total, zero_point, qmin, qmax, dtype)


class _Factor(NamedTuple):
    """``m / 2^e`` along one dimension, and the extremes of both."""

    multiplier: Tensor
    shift: Tensor
    largest_multiplier: int
    least_shift: int

    @classmethod
    def of(cls, operator: str, multiplier: Tensor, shift: Tensor, rank: int, axis: int) -> _Factor:
        if multiplier.dtype != torch.int64 or shift.dtype != torch.int64:
            raise CompileError(f"fxquant.{operator}: multiplier and shift must be int64")
        if not multiplier.numel():
            return cls(multiplier, shift, 0, 0)
        least, largest = (int(value) for value in multiplier.aminmax())
        low, high = (int(value) for value in shift.aminmax())
        if max(-least, largest) >= 2**31 or low < 0 or high > LARGEST_SHIFT:
            raise CompileError(
                f"fxquant.{operator}: multipliers in [{least}, {largest}] and shifts in "
                f"[{low}, {high}]; needed are |m| < 2^31 and 0 <= e <= {LARGEST_SHIFT}"
            )
        shape = [1] * rank
        if multiplier.numel() > 1 or shift.numel() > 1:
            shape[axis] = -1
        wide = multiplier.reshape(shape), shift.reshape(shape)
        return cls(*wide, max(-least, largest), low)


def _check_output(operator: str, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype) -> None:
    if dtype not in _OUTPUTS:
        known = ", ".join(str(output) for output in _OUTPUTS)
        raise CompileError(f"fxquant.{operator}: the output is {dtype}; use one of {known}")
    info = torch.iinfo(dtype)
    if not (info.min <= qmin <= qmax <= info.max and abs(zero_point) < 2**32):
        raise CompileError(
            f"fxquant.{operator}: the codes [{qmin}, {qmax}] with zero point {zero_point} are no "
            f"{dtype}"
        )


def _finish(rounded: Tensor, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    # A memory pass less where there is nothing to add; |rounded + z| < 2^35.
    codes = rounded.add_(zero_point) if zero_point else rounded
    return codes.clamp_(qmin, qmax).to(dtype)


def _scaled(x: Tensor, x_zero_point: int, largest: int, factor: _Factor) -> Tensor:
    """``round_half_even((x − z) · m / 2^e)`` as a new int64 tensor, saturated at ±2^33.

    ``largest`` is what |x − z| does not exceed.
    """
    wide = x.to(torch.int64, copy=True)
    if x_zero_point:
        wide.sub_(x_zero_point)
    product = largest * factor.largest_multiplier
    if product >= LARGEST_PRODUCT:
        result = _scaled_in_parts(wide, factor)
    else:
        result = _round_shift(wide.mul_(factor.multiplier), factor.shift)
    if product >> factor.least_shift >= LARGEST_RESULT:
        result.clamp_(-LARGEST_RESULT, LARGEST_RESULT)
    return result


def _largest_input(operator: str, x: Tensor, zero_point: int) -> int:
    """A bound of |x − z|: by the type, and for an int64 by its values."""
    if x.is_floating_point() or x.dtype == torch.bool:
        raise CompileError(f"fxquant.{operator}: the input is {x.dtype}; it takes integers only")
    if x.dtype == torch.int64 and x.numel():
        least, greatest = (int(value) for value in x.aminmax())
    else:
        info = torch.iinfo(torch.int32 if x.dtype == torch.int64 else x.dtype)
        least, greatest = info.min, info.max
    largest = max(zero_point - least, greatest - zero_point)
    if largest > LARGEST_INPUT:
        raise CompileError(
            f"fxquant.{operator}: the input reaches {largest}, above 2^52; it is no accumulator "
            "of this library"
        )
    return largest


def _round_shift(product: Tensor, shift: Tensor) -> Tensor:
    """``round_half_even(p / 2^e)``, |p| ≤ 2^62; overwrites ``product``.

    ``⌊(p + 2^(e−1) − 1 + odd) / 2^e⌋`` with the parity of ``⌊p / 2^e⌋``: a tie goes up only from
    an odd floor. For e = 0 both summands vanish.
    """
    rounds = (shift > 0).to(torch.int64)
    odd = (product >> shift).bitwise_and_(rounds)
    half = (torch.ones_like(shift) << shift >> 1) - rounds
    return product.add_(odd).add_(half).bitwise_right_shift_(shift)


def _scaled_in_parts(wide: Tensor, factor: _Factor) -> Tensor:
    """The same for products of up to 2^83, as the module's docstring derives; overwrites ``wide``.

    With e < 30 the largest useful input is X = 2^(e+33) / |m|: what is cut off there saturates
    anyway, and it keeps h below 2^60. With e ≥ 30 there is nothing to cut: a = 24, |x₁| ≤ 2^28, so
    |h| ≤ 2^59 + 2^31. In both |x₀ · m| < 2^55.
    """
    multiplier, shift = factor.multiplier, factor.shift
    one = torch.ones_like(shift)
    low_bits = (shift - 1).clamp(0, 24)
    if factor.least_shift < 30:
        limit = (one << (shift + 33).clamp(max=62)) // multiplier.abs().clamp(min=1)
        limit = torch.where((shift >= 30) | (multiplier == 0), LARGEST_INPUT, limit + 1)
        wide = torch.minimum(torch.maximum(wide, -limit), limit)
    high = wide >> low_bits
    low = wide.sub_(high << low_bits).mul_(multiplier)
    # 2h + [t > 0] is the sum of both roundings of x₀ · m / 2^a, and of twice the rest.
    high.mul_(2 * multiplier).add_(low >> low_bits)
    high.add_(low.add_((one << low_bits) - 1).bitwise_right_shift_(low_bits))
    return _round_shift(high, shift - low_bits + 1)
