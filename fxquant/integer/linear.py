"""The linear layer, and the type in which plain sums are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.integer.accumulators import Finish, check_call, in_chunks
from fxquant.integer.bounds import (
    FLOAT32_LIMIT,
    Bound,
    checked_bound,
    input_range,
    shifted_weight,
    weight_reach,
)


def exact_matmul_dtype(
    bound: Bound, x_dtype: torch.dtype, x_zero_point: int, shifted: Tensor
) -> torch.dtype:
    """The float type in which a matrix product, or any plain sum, of these integers is exact.

    float64 holds every partial sum below 2^53. float32 does below 2^24, whatever the order of the
    sum and with or without fused multiply-adds; and where the factors are at most 256 they are
    exact in bfloat16 too, so that no setting of torch's float32 precision can round them.
    """
    low, high = input_range(x_dtype, x_zero_point)
    if bound.products >= FLOAT32_LIMIT or max(-low, high) > 256:
        return torch.float64
    if shifted.numel():
        least, largest = (float(value) for value in shifted.aminmax())
        if max(-least, largest) > 256:
            return torch.float64
    return torch.float32


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
    shifted = shifted_weight(weight, weight_zero_point)
    bound = checked_bound("linear", x.dtype, x_zero_point, weight_reach(shifted), bias)
    matrix = shifted.to(exact_matmul_dtype(bound, x.dtype, x_zero_point, shifted)).t()
    finish = Finish(
        -1,
        bound,
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

    def compute(rows: Tensor, extra: Tensor | None) -> Tensor:
        wide = rows.to(matrix.dtype).sub_(x_zero_point)
        # Autocast would give the sums in bfloat16, rounded to 8 bits.
        with torch.autocast("cpu", enabled=False):
            sums = wide @ matrix
        return finish(sums, extra)

    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    extra = None if residual is None else residual.reshape(-1, outputs)
    result = in_chunks(rows, extra, torch.contiguous_format, max(inputs, outputs), compute)
    return result.reshape(*x.shape[:-1], outputs)
