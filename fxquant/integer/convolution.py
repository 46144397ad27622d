"""Convolutions of one, two and three dimensions, and transposed ones.

The zero point is subtracted first, so that torch's zero padding pads with the zero point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.integer.accumulators import Finish, check_call, in_chunks
from fxquant.integer.bounds import checked_bound, shifted_weight, weight_reach
from fxquant.integer.convolution_sums import Compute, Geometry, WindowSums
from fxquant.integer.rounding import channel_memory_format


def conv(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
) -> Tensor:
    """``a = Σ (q_x − z_x)(q_w − z_w) + b_q`` over each window, then rescaled to codes.

    ``x`` is [N, I, ...] or [I, ...], ``weight`` int8 [O, I/groups, ...] of rank 3, 4 or 5,
    ``weight_scale`` float32 [O] or [1], ``bias`` int32 [O], ``residual`` codes of the output's
    shape. Padding pads with ``x_zero_point``. Raises CompileError where an accumulator could
    leave its range.
    """
    check_call("conv", x, dtype, residual)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    sums = WindowSums.of("conv", x, x_zero_point, weight, weight_zero_point, bias, geometry)
    finish = Finish(
        1 - weight.dim(),
        sums.bound,
        sums.bias_left,
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
    return over_samples(x, residual, weight.dim(), sums.outputs, sums.compute, finish)


def conv_transpose(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
) -> Tensor:
    """The transposed convolution of ``q_x − z_x`` with ``q_w − z_w``, plus ``b_q``.

    As `conv`, but ``weight`` is int8 [I, O/groups, ...]; scales and zero points of the weight are
    still those of the O output channels. Positions that no input reaches hold the bias alone.
    """
    check_call("conv_transpose", x, dtype, residual)
    shifted = shifted_weight(weight, weight_zero_point, transposed=True, groups=groups)
    reach = weight_reach(shifted, transposed=True, groups=groups)
    bound = checked_bound("conv_transpose", x.dtype, x_zero_point, reach, bias)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    # float64 runs as a matrix product whose results are added up: plain sums.
    wide_weight = shifted.to(torch.float64)

    def compute(samples: Tensor) -> Tensor:
        sums: Tensor = function(
            samples.to(torch.float64).sub_(x_zero_point),
            wide_weight,
            None,
            tuple(stride),
            tuple(padding),
            tuple(output_padding),
            groups,
            tuple(dilation),
        )
        return sums

    finish = Finish(
        1 - weight.dim(),
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
    spread = math.prod(stride) * math.prod(x.shape[2 - weight.dim() :])
    return over_samples(
        x, residual, weight.dim(), groups * weight.shape[1] * spread, compute, finish
    )


def over_samples(
    x: Tensor,
    residual: Tensor | None,
    batched_rank: int,
    outputs: int,
    compute: Compute,
    finish: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """``finish(sums, residual)`` of every sample, in the memory format of ``x``."""
    if x.dim() < batched_rank:
        one = None if residual is None else residual.unsqueeze(0)
        whole = over_samples(x.unsqueeze(0), one, batched_rank, outputs, compute, finish)
        return whole.squeeze(0)
    layout = channel_memory_format(x)
    elements = max(outputs, math.prod(x.shape[1:]))

    def run(samples: Tensor, extra: Tensor | None) -> Tensor:
        return finish(compute(samples.contiguous(memory_format=layout)), extra)

    return in_chunks(x, residual, layout, elements, run)
