"""Products of two activations: attention's Q·Kᵀ and P·V, and elementwise ones as integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.accumulators import check_call, in_chunks
from fxquant.integer.bounds import (
    FLOAT64_LIMIT,
    INT32_LIMIT,
    accumulator_dtype,
    check_codes,
    largest_operand,
)
from fxquant.integer.linear import exact_sum_dtype
from fxquant.integer.rounding import centered_as, float32_scalar, to_codes


def matmul(
    a: Tensor,
    a_scale: float,
    a_zero_point: int,
    b: Tensor,
    b_scale: float,
    b_zero_point: int,
    alpha: float,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """``round_half_even(float32(Σ (q_a − z_a)(q_b − z_b)) · m) + z``, clamped.

    ``a`` is [..., M, K] and ``b`` [..., K, N], uint8, int8 or int16; they broadcast like
    `torch.matmul`. ``m = float32(s_a · s_b · alpha / s_y)``. ``dtype=torch.float32`` gives
    ``float32(Σ) · float32(s_a · s_b · alpha)``. Raises CompileError where a sum could leave its
    range: int32 for 8-bit operands, below 2^53 with 16 bits.
    """
    check_call("matmul", a, dtype, None)
    check_codes("matmul", b)
    factor = a_scale * b_scale * alpha
    multiplier = float32_scalar(factor if dtype == torch.float32 else factor / scale)

    def finish(sums: Tensor) -> Tensor:
        real = sums.to(torch.float32).mul_(multiplier)
        if dtype == torch.float32:
            return real
        return to_codes(real, zero_point, qmin, qmax, dtype)

    return _products("matmul", a, a_zero_point, b, b_zero_point, finish)


def weighted_mean(
    a: Tensor,
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
    """The mean of ``b`` weighted by each row of ``a``, as attention takes it of its values.

    ``round_half_even(float32(float32(Σ (q_a − z_a)(q_b − z_b)) / float32(Σ (q_a − z_a))) · m) + z``
    clamped, with ``m = float32(s_b / s_y)``: the scale of ``a`` cancels. The quotient is rounded
    to float32 once, and is 0 for a row of zeros. ``dtype=torch.float32`` gives the quotient times
    float32(s_b). Operands and errors are those of `matmul`.
    """
    check_call("weighted_mean", a, dtype, None)
    check_codes("weighted_mean", b)
    wide = accumulator_dtype(a.dtype, b.dtype)
    sums = _products(
        "weighted_mean", a, a_zero_point, b, b_zero_point, lambda sums: sums.to(torch.float32)
    )
    total = (a.to(wide) - a_zero_point).sum(-1, keepdim=True).to(torch.float32)
    real = sums.div_(torch.where(total == 0, torch.ones_like(total), total))
    if dtype == torch.float32:
        return real.mul_(float32_scalar(b_scale))
    return to_codes(real.mul_(float32_scalar(b_scale / scale)), zero_point, qmin, qmax, dtype)


def matmul_accumulate(a: Tensor, a_zero_point: int, b: Tensor, b_zero_point: int) -> Tensor:
    """``Σ (q_a − z_a)(q_b − z_b)``: int32, or int64 where an operand has 16 bits.

    Operands and errors are those of `matmul`.
    """
    check_codes("matmul_accumulate", a)
    check_codes("matmul_accumulate", b)
    wide = accumulator_dtype(a.dtype, b.dtype)
    return _products(
        "matmul_accumulate", a, a_zero_point, b, b_zero_point, lambda sums: sums.to(wide)
    )


def mul_accumulate(a: Tensor, a_zero_point: int, b: Tensor, b_zero_point: int) -> Tensor:
    """``(q_a − z_a)(q_b − z_b)``: int32, or int64 where an operand has 16 bits; broadcasts."""
    check_codes("mul_accumulate", a)
    check_codes("mul_accumulate", b)
    # A product of two 16-bit operands needs 33 bits.
    wide = accumulator_dtype(a.dtype, b.dtype)
    return (a.to(wide) - a_zero_point) * (b.to(wide) - b_zero_point)


def _products(
    operator: str,
    a: Tensor,
    a_zero_point: int,
    b: Tensor,
    b_zero_point: int,
    finish: Callable[[Tensor], Tensor],
) -> Tensor:
    """``finish`` of exact sums, in the float type that holds them; it may overwrite them."""
    carrier = _carrier(operator, a, a_zero_point, b, b_zero_point)

    def compute(left: Tensor, right: Tensor | None) -> Tensor:
        assert right is not None
        wide_left = centered_as(left, a_zero_point, carrier)
        wide_right = centered_as(right, b_zero_point, carrier)
        # Autocast would give the sums in bfloat16, rounded to 8 bits.
        with torch.autocast("cpu", enabled=False):
            sums = wide_left @ wide_right
        return finish(sums)

    if a.shape[:-2] != b.shape[:-2] or a.dim() == 2:
        return compute(a, b)
    (rows, depth), columns = a.shape[-2:], b.shape[-1]
    batch = a.shape[:-2].numel()
    result = in_chunks(
        a.reshape(batch, rows, depth),
        b.reshape(batch, depth, columns),
        torch.contiguous_format,
        max(rows * depth, depth * columns, rows * columns),
        compute,
    )
    return result.reshape(*a.shape[:-1], columns)


def _carrier(
    operator: str, a: Tensor, a_zero_point: int, b: Tensor, b_zero_point: int
) -> torch.dtype:
    """The float type of the sums; raises CompileError where they do not fit the accumulator."""
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise CompileError(
            f"fxquant.{operator}: takes [..., M, K] and [..., K, N], not {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    left = largest_operand(a.dtype, a_zero_point)
    right = largest_operand(b.dtype, b_zero_point)
    depth = a.shape[-1]
    limit = INT32_LIMIT
    if accumulator_dtype(a.dtype, b.dtype) == torch.int64:
        limit = FLOAT64_LIMIT
    if depth * left * right > limit:
        raise CompileError(
            f"fxquant.{operator}: a sum of {depth} products can reach {depth * left * right}, "
            f"above {limit}; split the shared dimension"
        )
    return exact_sum_dtype(depth * left * right, left, right)
