"""The linear layer, and the type in which plain sums are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.integer.accumulators import Finish, check_call, in_chunks
from fxquant.integer.bounds import (
    FLOAT32_LIMIT,
    Bound,
    checked_bound,
    largest_operand,
    shifted_weight,
    weight_reach,
)
from fxquant.integer.rounding import centered_as


def exact_sum_dtype(products: int, *factors: int) -> torch.dtype:
    """The float type in which a matrix product, or any plain sum, of integers is exact.

    ``products`` bounds the sum of any part of the products, ``factors`` the operands. float64
    holds every partial sum below 2^53. float32 does below 2^24, whatever the order of the sum and
    with or without fused multiply-adds; and where the factors are at most 256 they are exact in
    bfloat16 too, so that no setting of torch's float32 precision can round them.
    """
    if products >= FLOAT32_LIMIT or any(factor > 256 for factor in factors):
        return torch.float64
    return torch.float32


def exact_matmul_dtype(
    bound: Bound, x_dtype: torch.dtype, x_zero_point: int, shifted: Tensor
) -> torch.dtype:
    """`exact_sum_dtype` of the codes of an input and a weight without its zero point."""
    carrier = exact_sum_dtype(bound.products, largest_operand(x_dtype, x_zero_point))
    if carrier == torch.float64 or not shifted.numel():
        return carrier
    least, largest = (float(value) for value in shifted.aminmax())
    return exact_sum_dtype(bound.products, int(max(-least, largest)))


@dataclass(frozen=True, eq=False)
class RowSums:
    """``Σ (q_x − z_x)(q_w − z_w)`` over the last dimension of codes [rows, K], without the bias.

    ``matrix`` is the weight without its zero point, [K, O], in a float type in which every sum is
    exact. Calling it gives [rows, O] in that type.
    """

    matrix: Tensor
    bound: Bound
    x_zero_point: int

    @classmethod
    def of(
        cls,
        operator: str,
        x: Tensor,
        x_zero_point: int,
        weight: Tensor,
        weight_zero_point: Tensor | None,
        bias: Tensor | None,
    ) -> RowSums:
        """Raises CompileError where an accumulator could leave its range."""
        shifted = shifted_weight(weight, weight_zero_point)
        bound = checked_bound(operator, x.dtype, x_zero_point, weight_reach(shifted), bias)
        carrier = exact_matmul_dtype(bound, x.dtype, x_zero_point, shifted)
        return cls(shifted.to(carrier).t(), bound, x_zero_point)

    def __call__(self, rows: Tensor) -> Tensor:
        """The sums of codes [rows, K]: [rows, O]."""
        wide = centered_as(rows, self.x_zero_point, self.matrix.dtype)
        # Autocast would give the sums in bfloat16, rounded to 8 bits.
        with torch.autocast("cpu", enabled=False):
            return wide @ self.matrix

    def over_rows(
        self,
        x: Tensor,
        residual: Tensor | None,
        finish: Callable[[Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """``finish(sums, residual)`` for all rows of ``x`` [..., K]: [..., O]."""
        inputs, outputs = self.matrix.shape
        extra = None if residual is None else residual.reshape(-1, outputs)
        result = in_chunks(
            x.reshape(-1, inputs),
            extra,
            torch.contiguous_format,
            max(inputs, outputs),
            lambda rows, part: finish(self(rows), part),
        )
        return result.reshape(*x.shape[:-1], outputs)


def linear(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
) -> Tensor:
    """``a = Σ (q_x − z_x)(q_w − z_w) + b_q`` over the last dimension, then rescaled to codes.

    ``x`` is [..., K], ``weight`` int8 [O, K], ``weight_scale`` float32 [O] or [1], ``bias`` int32
    [O], ``residual`` codes of the output's shape [..., O]. Raises CompileError where an
    accumulator could leave its range.
    """
    check_call("linear", x, dtype, residual)
    sums = RowSums.of("linear", x, x_zero_point, weight, weight_zero_point, bias)
    finish = Finish(
        -1,
        sums.bound,
        bias,
        x_scale,
        weight_scale,
        scale,
        zero_point,
        qmin,
        qmax,
        dtype,
        residual_scale,
        residual_zero_point,
    )
    return sums.over_rows(x, residual, finish)
