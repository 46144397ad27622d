"""How large an accumulator can get, from the weights alone.

With 8-bit activations an accumulator is an int32. One product is at most 255 · 255, and with
symmetric weights 255 · 128, so any layer with K ≤ 33025 (65793) products for each output fits
without a bias. The check here is the exact one, for the weights and the bias at hand. With 16-bit
activations an accumulator is an int64 that stays below 2^53, so that float64 holds it.
"""

from __future__ import annotations

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


def largest_input(dtype: torch.dtype, zero_point: int) -> int:
    """The largest |q − z| of any code that ``dtype`` can hold."""
    info = torch.iinfo(dtype)
    return max(info.max - zero_point, zero_point - info.min)


def shifted_weight(
    weight: Tensor, zero_point: Tensor | None, *, transposed: bool = False, groups: int = 1
) -> Tensor:
    """``q_w − z_w`` in float64, of the weight's shape.

    ``zero_point`` is [1] or one for each output channel: dimension 0 of the weight or, for a
    transposed convolution of weight [I, O/groups, ...], the pair (group, dimension 1).
    """
    wide = weight.to(torch.float64)
    if zero_point is None:
        return wide
    shift = zero_point.to(torch.float64)
    if shift.numel() == 1:
        return wide - shift.reshape(())
    spatial = [1] * (weight.dim() - 2)
    if not transposed:
        return wide - shift.reshape(-1, 1, *spatial)
    grouped = wide.reshape(groups, -1, *weight.shape[1:])
    return (grouped - shift.reshape(groups, 1, -1, *spatial)).flatten(0, 1)


def weight_reach(shifted: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """``Σ |q_w − z_w|`` over the products of each output channel: float64 [O], exact."""
    magnitude = shifted.abs()
    if not transposed:
        return magnitude.flatten(1).sum(1)
    grouped = magnitude.reshape(groups, -1, *shifted.shape[1:])
    return grouped.flatten(3).sum((1, 3)).flatten()


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
    reach = weight_reach(shifted, transposed=transposed, groups=groups).to(torch.int64)
    room = accumulator_limit(x_dtype) - largest_input(x_dtype, x_zero_point) * reach
    return room.clamp(max=INT32_LIMIT)


def accumulator_limit(x_dtype: torch.dtype) -> int:
    """The largest accumulator: int32 for 8-bit activations, what float64 holds for 16 bits."""
    return FLOAT64_LIMIT if x_dtype == torch.int16 else INT32_LIMIT


def checked_bound(
    operator: str, x_dtype: torch.dtype, x_zero_point: int, reach: Tensor, bias: Tensor | None
) -> int:
    """The largest |accumulator| that any input of ``x_dtype`` can cause.

    Raises CompileError where it leaves the accumulator's range: a wrap-around is never silent.
    """
    bound = reach * largest_input(x_dtype, x_zero_point)
    if bias is not None:
        bound = bound + bias.to(torch.float64).abs()
    largest = int(bound.max()) if bound.numel() else 0
    limit = accumulator_limit(x_dtype)
    if largest > limit:
        raise CompileError(
            f"fxquant.{operator}: channel {int(bound.argmax())} can reach the accumulator "
            f"{largest}, above {limit}; use fewer weight bits, or clamp the bias to largest_bias"
        )
    return largest
