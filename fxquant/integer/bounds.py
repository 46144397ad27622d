"""How large an accumulator can get, from the weights alone.

With 8-bit activations an accumulator is an int32. One product is at most 255 · 255, and with
symmetric weights 255 · 128, so any layer with K ≤ 33025 (65793) products for each output fits
without a bias. The check here is the exact one, for the weights and the bias at hand. With 16-bit
activations an accumulator is an int64 that stays below 2^53, so that float64 holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import CompileError

CODE_DTYPES = (torch.uint8, torch.int8, torch.int16)
INT32_LIMIT = 2**31 - 1
FLOAT64_LIMIT = 2**53
FLOAT32_LIMIT = 2**24


def check_codes(operator: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise CompileError unless ``x`` holds integer codes and ``dtype`` can hold an output's."""
    for name, found in (("input", x.dtype), ("output", dtype)):
        if found is not None and found not in CODE_DTYPES:
            known = ", ".join(str(code) for code in CODE_DTYPES)
            raise CompileError(f"fxquant.{operator}: the {name} is {found}; use one of {known}")


def input_range(dtype: torch.dtype, zero_point: int) -> tuple[int, int]:
    """The least and the largest ``q − z`` of any code of ``dtype``, or of the padding (0)."""
    info = torch.iinfo(dtype)
    return min(info.min - zero_point, 0), max(info.max - zero_point, 0)


def largest_operand(dtype: torch.dtype, zero_point: int) -> int:
    """The largest ``|q − z|`` of any code of ``dtype``, or of the padding (0)."""
    low, high = input_range(dtype, zero_point)
    return max(-low, high)


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The integer type of products of codes and their sums: int64 as soon as one has 16 bits."""
    return torch.int64 if torch.int16 in dtypes else torch.int32


def shifted_weight(
    weight: Tensor, zero_point: Tensor | None, *, transposed: bool = False, groups: int = 1
) -> Tensor:
    """``q_w − z_w`` of the weight's shape, exact in a float type.

    ``zero_point`` is [1] or one for each output channel: dimension 0 of the weight or, for a
    transposed convolution of weight [I, O/groups, ...], the pair (group, dimension 1).
    """
    if zero_point is None:
        return weight.to(torch.float32)
    wide, shift = weight.to(torch.float64), zero_point.to(torch.float64)
    if shift.numel() == 1:
        return wide - shift.reshape(())
    spatial = [1] * (weight.dim() - 2)
    if not transposed:
        return wide - shift.reshape(-1, 1, *spatial)
    grouped = wide.reshape(groups, -1, *weight.shape[1:])
    return (grouped - shift.reshape(groups, 1, -1, *spatial)).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Reach:
    """The sums of the positive and of the negative weights of each output channel: float64 [O].

    The negative ones are summed without their sign.
    """

    positive: Tensor
    negative: Tensor


def weight_reach(shifted: Tensor, *, transposed: bool = False, groups: int = 1) -> Reach:
    """Over the products of each output channel; exact."""
    if transposed:
        grouped = shifted.reshape(groups, -1, *shifted.shape[1:])
        shifted = grouped.transpose(1, 2).flatten(0, 1)
    rows = shifted.flatten(1)
    # Without a zero point a weight is at most 2^7: in float32 a sum of 2^16 is still exact.
    dtype = rows.dtype if rows.shape[1] <= 2**16 else torch.float64
    positive = rows.clamp(min=0).sum(1, dtype=dtype).to(torch.float64)
    return Reach(positive, positive - rows.sum(1, dtype=dtype))


def largest_bias(
    weight: Tensor,
    weight_zero_point: Tensor | None,
    x_dtype: torch.dtype,
    x_zero_point: int,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """The largest |b_q| of each output channel that keeps its accumulator in range: int64 [O].

    Clamp an integer bias to ± this (it is never above the int32 range) before handing it to
    `conv`, `conv_transpose` or `linear`: only a channel whose weights are nearly zero, so that
    ``b / (s_x · s_w)`` explodes, is ever affected. Negative where the weights alone overflow.
    """
    shifted = shifted_weight(weight, weight_zero_point, transposed=transposed, groups=groups)
    reach = weight_reach(shifted, transposed=transposed, groups=groups)
    products = products_bound(x_dtype, x_zero_point, reach).to(torch.int64)
    return (accumulator_limit(x_dtype) - products).clamp(max=INT32_LIMIT)


def accumulator_limit(x_dtype: torch.dtype) -> int:
    """The largest accumulator: int32 for 8-bit activations, what float64 holds for 16 bits."""
    return FLOAT64_LIMIT if x_dtype == torch.int16 else INT32_LIMIT


def products_bound(x_dtype: torch.dtype, x_zero_point: int, reach: Reach) -> Tensor:
    """The largest |Σ (q_x − z_x)(q_w − z_w)| of each output channel: float64 [O].

    It holds for the sum of any part of the products too, because leaving out a product is an
    input code equal to its zero point.
    """
    low, high = input_range(x_dtype, x_zero_point)
    up = high * reach.positive - low * reach.negative
    down = high * reach.negative - low * reach.positive
    return torch.maximum(up, down)


@dataclass(frozen=True)
class Bound:
    """The largest |accumulator| before (``products``) and after (``total``) the bias is added."""

    products: int
    total: int


def checked_bound(
    operator: str, x_dtype: torch.dtype, x_zero_point: int, reach: Reach, bias: Tensor | None
) -> Bound:
    """How large an accumulator any input of ``x_dtype`` can cause.

    Raises CompileError where it leaves the accumulator's range: a wrap-around is never silent.
    """
    products = products_bound(x_dtype, x_zero_point, reach)
    if not products.numel():
        return Bound(0, 0)
    total = products if bias is None else products + bias.to(torch.float64).abs()
    largest, limit = int(total.max()), accumulator_limit(x_dtype)
    if largest > limit:
        raise CompileError(
            f"fxquant.{operator}: channel {int(total.argmax())} can reach the accumulator "
            f"{largest}, above {limit}; use fewer weight bits, or clamp the bias to largest_bias"
        )
    return Bound(int(products.max()), largest)
