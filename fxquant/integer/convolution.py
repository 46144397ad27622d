"""Convolutions of one, two and three dimensions, and transposed ones.

The zero point is subtracted first, so that torch's zero padding pads with the zero point. The
integers travel in float64, whose sums are exact below 2^53 in any order: `checked_bound` proves
the bound for the weights at hand. Samples are taken one by one, which keeps the unfolded input of
one image in the cache and halves the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.integer.accumulators import check_call, finish
from fxquant.integer.bounds import checked_bound, shifted_weight, weight_reach
from fxquant.integer.linear import exact_matmul_dtype
from fxquant.integer.rounding import channel_memory_format

_Accumulate = Callable[[Tensor], Tensor]  # codes of one sample [1, C, ...] -> exact sums


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
    shifted = shifted_weight(weight, weight_zero_point)
    bound = checked_bound("conv", x.dtype, x_zero_point, weight_reach(shifted), bias)
    pointwise = groups == 1 and not any(padding) and math.prod(weight.shape[2:]) == 1
    accumulate: _Accumulate
    if pointwise:
        carrier = exact_matmul_dtype(bound, x.dtype, x_zero_point, shifted)
        accumulate = _pointwise(shifted.to(carrier), bias, x_zero_point, stride)
    elif groups > 1 and weight.shape[1] == 1:
        accumulate = _depthwise(
            shifted, bias, x.dtype, x_zero_point, stride, padding, dilation, groups
        )
    else:
        accumulate = _general(shifted, bias, x_zero_point, stride, padding, dilation, groups)
    return finish(
        _over_samples(x, weight.dim(), accumulate),
        1 - weight.dim(),
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
    checked_bound("conv_transpose", x.dtype, x_zero_point, reach, bias)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    wide_bias = None if bias is None else bias.to(torch.float64)

    def accumulate(sample: Tensor) -> Tensor:
        wide = sample.to(torch.float64).sub_(x_zero_point)
        result: Tensor = function(
            wide,
            shifted,
            wide_bias,
            tuple(stride),
            tuple(padding),
            tuple(output_padding),
            groups,
            tuple(dilation),
        )
        return result

    return finish(
        _over_samples(x, weight.dim(), accumulate),
        1 - weight.dim(),
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


def _over_samples(x: Tensor, batched_rank: int, accumulate: _Accumulate) -> Tensor:
    """``float32(a)`` of every sample, in the memory format of ``x``."""
    samples = x if x.dim() == batched_rank else x.unsqueeze(0)
    if samples.shape[0] == 0:
        return accumulate(samples).to(torch.float32)
    result: Tensor | None = None
    for index, sample in enumerate(torch.split(samples, 1)):
        sums = accumulate(sample.contiguous())
        if result is None:
            shape = (samples.shape[0], *sums.shape[1:])
            layout = channel_memory_format(samples)
            result = torch.empty(shape, dtype=torch.float32).contiguous(memory_format=layout)
        result[index].copy_(sums[0])
    assert result is not None
    return result if x.dim() == batched_rank else result.squeeze(0)


def _general(
    shifted: Tensor,
    bias: Tensor | None,
    x_zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> _Accumulate:
    function = (F.conv1d, F.conv2d, F.conv3d)[shifted.dim() - 3]
    wide_bias = None if bias is None else bias.to(torch.float64)

    def accumulate(sample: Tensor) -> Tensor:
        wide = sample.to(torch.float64).sub_(x_zero_point)
        result: Tensor = function(
            wide, shifted, wide_bias, tuple(stride), tuple(padding), tuple(dilation), groups
        )
        return result

    return accumulate


def _pointwise(
    shifted: Tensor, bias: Tensor | None, x_zero_point: int, stride: Sequence[int]
) -> _Accumulate:
    """A kernel of one tap is a matrix product of the strided input's pixels."""
    matrix = shifted.flatten(1)
    column = None if bias is None else bias.to(shifted.dtype).unsqueeze(1)
    strides = tuple(slice(None, None, step) for step in stride)

    def accumulate(sample: Tensor) -> Tensor:
        pixels = sample[(slice(None), slice(None), *strides)]
        wide = pixels.to(shifted.dtype).sub_(x_zero_point)
        with torch.autocast("cpu", enabled=False):
            sums = matrix @ wide.flatten(2)
        if column is not None:
            sums += column
        return sums.reshape(*sums.shape[:2], *pixels.shape[2:])

    return accumulate


def _depthwise(
    shifted: Tensor,
    bias: Tensor | None,
    x_dtype: torch.dtype,
    x_zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> _Accumulate:
    """One input channel for each output channel: a multiply-add of whole planes for each tap."""
    # The bound that `conv` checked is int32's for 8-bit codes and 2^53 for int16.
    carrier = torch.int64 if x_dtype == torch.int16 else torch.int32
    outputs_per_input = len(shifted) // groups
    kernel = shifted.shape[2:]
    spatial = len(kernel)
    taps = shifted.to(carrier).flatten(2).unbind(2)
    both_sides = [pad for pad in reversed(padding) for _ in range(2)]

    def accumulate(sample: Tensor) -> Tensor:
        wide = F.pad(sample.to(carrier).sub_(x_zero_point), both_sides)
        if outputs_per_input > 1:
            wide = wide.repeat_interleave(outputs_per_input, dim=1)
        extents = [
            (length - step * (size - 1) - 1) // hop + 1
            for length, size, step, hop in zip(
                wide.shape[2:], kernel, dilation, stride, strict=True
            )
        ]
        sums = wide.new_zeros((sample.shape[0], len(shifted), *extents))
        if bias is not None:
            sums += bias.to(carrier).reshape(-1, *[1] * spatial)
        for tap, position in zip(
            taps, itertools.product(*(range(size) for size in kernel)), strict=True
        ):
            window = wide
            for axis, index in enumerate(position):
                start, hop = index * dilation[axis], stride[axis]
                stop = start + hop * (extents[axis] - 1) + 1
                window = window[(slice(None),) * (2 + axis) + (slice(start, stop, hop),)]
            sums.addcmul_(window, tap.reshape(-1, *[1] * spatial))
        return sums

    return accumulate
