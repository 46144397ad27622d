"""Averages: the sum of ``q − z`` is an exact integer, and one multiplication divides it.

    q_y = clamp(round_half_even(float32(Σ (q_x − z_x)) · float32(s_x / (s_y · count))) + z_y)

Maximum pooling needs no operator: it works on the codes themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.integer.bounds import check_codes
from fxquant.integer.rounding import channel_memory_format, to_codes


def avg_pool(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """The average over windows of [N, C, ...] or [C, ...]; 1d, 2d or 3d by ``kernel_size``.

    Padding adds 0 to the sum, and to the count as torch counts it: with ``count_include_pad`` the
    part of the window inside the padded input, else the part inside the input;
    ``divisor_override`` replaces the count. An empty ``stride`` means ``kernel_size``.
    """
    check_codes("avg_pool", x, dtype)
    spatial = len(kernel_size)
    steps = tuple(stride) or tuple(kernel_size)
    # float64: exact, and the integer types have no kernels in every dimension. A pool of one
    # dimension has no divisor_override in torch, so it runs as one of two.
    wide = x.to(torch.float64).sub_(x_zero_point)
    function = F.avg_pool3d if spatial == 3 else F.avg_pool2d
    sums: Tensor = function(
        wide.unsqueeze(-2) if spatial == 1 else wide,
        (1, *kernel_size) if spatial == 1 else tuple(kernel_size),
        (1, *steps) if spatial == 1 else steps,
        (0, *padding) if spatial == 1 else tuple(padding),
        ceil_mode,
        True,
        1,
    )
    if spatial == 1:
        sums = sums.squeeze(-2)
    count = torch.ones((), dtype=torch.float64)
    for axis in range(spatial):
        lengths = _window_lengths(
            x.shape[axis - spatial],
            sums.shape[axis - spatial],
            kernel_size[axis],
            steps[axis],
            padding[axis],
            count_include_pad,
        )
        count = count.unsqueeze(-1) * torch.tensor(lengths, dtype=torch.float64)
    if divisor_override is not None:
        count = torch.full_like(count, divisor_override)
    sums = sums.contiguous(memory_format=channel_memory_format(x))
    return _divide(sums, count, x_scale, scale, zero_point, qmin, qmax, dtype)


def _window_lengths(
    size: int, outputs: int, kernel: int, stride: int, padding: int, include_padding: bool
) -> list[int]:
    """How many positions each window along one dimension averages over."""
    lengths = []
    for index in range(outputs):
        start = index * stride - padding
        stop = min(start + kernel, size + padding)
        if not include_padding:
            start, stop = max(start, 0), min(stop, size)
        lengths.append(stop - start)
    return lengths


def adaptive_avg_pool(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    output_size: Sequence[int],
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """The average over ``output_size`` windows for each dimension of [N, C, ...] or [C, ...].

    Window i of o over a length L is ``[⌊i·L/o⌋, ⌈(i+1)·L/o⌉)``, as in torch.
    """
    check_codes("adaptive_avg_pool", x, dtype)
    spatial = len(output_size)
    sums = x
    count = torch.ones((), dtype=torch.int64)
    for axis, outputs in enumerate(output_size):
        size = x.shape[axis - spatial]
        windows = [(i * size // outputs, -((i + 1) * size // -outputs)) for i in range(outputs)]
        # The sum of an integer tensor is an int64.
        parts = [
            sums.narrow(axis - spatial, start, stop - start).sum(axis - spatial, keepdim=True)
            for start, stop in windows
        ]
        sums = torch.cat(parts, axis - spatial)
        lengths = torch.tensor([stop - start for start, stop in windows])
        count = count.unsqueeze(-1) * lengths
    sums = (sums - count * x_zero_point).contiguous(memory_format=channel_memory_format(x))
    return _divide(sums, count, x_scale, scale, zero_point, qmin, qmax, dtype)


def mean(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    dim: Sequence[int],
    keepdim: bool,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """The mean over ``dim`` (all dimensions where it is empty)."""
    check_codes("mean", x, dtype)
    axes = tuple(dim) or tuple(range(x.dim()))
    number = math.prod(x.shape[axis] for axis in axes)
    sums = x.sum(axes, keepdim=keepdim) - number * x_zero_point
    count = torch.tensor(number, dtype=torch.int64)
    return _divide(sums, count, x_scale, scale, zero_point, qmin, qmax, dtype)


def _divide(
    sums: Tensor,
    count: Tensor,
    x_scale: float,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    factor = (x_scale / (count.to(torch.float64) * scale)).to(torch.float32)
    return to_codes(sums.to(torch.float32).mul_(factor), zero_point, qmin, qmax, dtype)
