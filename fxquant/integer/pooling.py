"""Averages and maxima over windows.

The sum of ``q − z`` is an exact integer, and one multiplication divides it:

    q_y = clamp(round_half_even(float32(Σ (q_x − z_x)) · float32(s_x / (s_y · count))) + z_y)

The maximum works on the codes themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.integer.bounds import check_codes
from fxquant.integer.rounding import channel_memory_format, to_codes


def max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """The largest code of each window of [N, C, ...] or [C, ...]; 1d, 2d or 3d by ``kernel_size``.

    The result has the input's type, scale and zero point. Padding never wins over a code. The
    windows are torch's; an empty ``stride`` means ``kernel_size``.
    """
    check_codes("max_pool", x)
    return _over_windows(
        x,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        torch.iinfo(x.dtype).min,
        torch.maximum,
    )


def _over_windows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    outside: int,
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The combination of all values of each window, where ``outside`` surrounds the input.

    One dimension after the other: a window's maximum (or sum) is that of its lines. torch itself
    has no pooling of integers for every number of dimensions and every layout.
    """
    result = x
    numbers = window_numbers(x, kernel_size, stride, padding, dilation, ceil_mode)
    for index, (number, kernel, hop, pad, step) in enumerate(
        zip(numbers, kernel_size, stride or kernel_size, padding, dilation, strict=True)
    ):
        axis = x.dim() - len(numbers) + index
        span = (number - 1) * hop + 1
        missing = span + step * (kernel - 1) - x.shape[axis] - pad
        sides = [0, 0] * (len(numbers) - 1 - index) + [pad, max(missing, 0)]
        padded = F.pad(result, sides, value=outside) if any(sides) else result
        before = (slice(None),) * axis
        result = functools.reduce(
            combine,
            (
                padded[(*before, slice(first, first + span, hop))]
                for first in range(0, step * kernel, step)
            ),
        )
    return result.contiguous(memory_format=channel_memory_format(x))


def window_numbers(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, ...]:
    """How many windows fit along each spatial dimension; in ``ceil_mode`` the last may stick out.

    In that mode a window that would start in the padding on the right is dropped.
    """
    numbers = []
    for size, kernel, hop, pad, step in zip(
        x.shape[x.dim() - len(kernel_size) :],
        kernel_size,
        stride or kernel_size,
        padding,
        dilation,
        strict=True,
    ):
        room = size + 2 * pad - step * (kernel - 1) - 1
        number = (room + (hop - 1 if ceil_mode else 0)) // hop + 1
        if ceil_mode and (number - 1) * hop >= size + pad:
            number -= 1
        numbers.append(number)
    return tuple(numbers)


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
    # One value is below 2^16 in 16 bits, and at most 255 in 8.
    short = x.dtype != torch.int16 and math.prod(kernel_size) < 2**23
    wide = x.to(torch.int32 if short else torch.int64).sub_(x_zero_point)
    ones = (1,) * spatial
    sums = _over_windows(wide, kernel_size, steps, padding, ones, ceil_mode, 0, torch.add)
    count = torch.ones((), dtype=torch.float64)
    for axis in range(spatial):
        lengths = window_lengths(
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
    return _divide(sums, count, x_scale, scale, zero_point, qmin, qmax, dtype)


def window_lengths(
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
