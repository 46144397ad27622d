"""The linear layer, and the exact matrix product that pointwise convolutions share."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.integer.accumulators import check_call, finish
from fxquant.integer.bounds import (
    FLOAT32_LIMIT,
    checked_bound,
    largest_input,
    shifted_weight,
    weight_reach,
)


def exact_matmul_dtype(
    bound: int, x_dtype: torch.dtype, x_zero_point: int, shifted: Tensor
) -> torch.dtype:
    """The float type in which a matrix product of these integers is exact.

    float64 holds every partial sum below 2^53. float32 does below 2^24, whatever the order of the
    sum and with or without fused multiply-adds; and where the factors are at most 256 they are
    exact in bfloat16 too, so that torch.set_float32_matmul_precision cannot round them. This is
    for matrix products only: a float32 convolution may run as Winograd, which is no plain sum.
    """
    fits = bound < FLOAT32_LIMIT and largest_input(x_dtype, x_zero_point) <= 256
    if fits and (shifted.numel() == 0 or float(shifted.abs().max()) <= 256):
        return torch.float32
    return torch.float64


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
    carrier = exact_matmul_dtype(bound, x.dtype, x_zero_point, shifted)
    rows = x.reshape(-1, weight.shape[1]).to(carrier).sub_(x_zero_point)
    # Autocast would run a float32 product in bfloat16, and round its sums to 8 bits.
    with torch.autocast("cpu", enabled=False):
        accumulator = rows @ shifted.to(carrier).t()
    if bias is not None:
        accumulator += bias.to(carrier)
    return finish(
        accumulator.to(torch.float32).reshape(*x.shape[:-1], weight.shape[0]),
        -1,
        x_scale,
        weight_scale,
        scale,
        zero_point,
        qmin,
        qmax,
        dtype,
        residual,
        residual_scale,
        residual_zero_point,
    )
