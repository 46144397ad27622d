"""What the operators return for fake tensors: empty tensors of the right shape, type and layout.

The functions have the names and the arguments of the operators. An operator without one here runs
its own implementation: it looks at shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.integer.bounds import accumulator_dtype
from fxquant.integer.pooling import window_numbers
from fxquant.integer.rounding import channel_memory_format

# ruff: noqa: D103


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
    shape = _conv_shape(x, weight, stride, padding, dilation, groups)
    return _like_channels(x, weight.dim(), shape, dtype)


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
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    shape = convolve(
        *_float_shapes(x, weight),
        None,
        tuple(stride),
        tuple(padding),
        tuple(output_padding),
        groups,
        tuple(dilation),
    ).shape
    return _like_channels(x, weight.dim(), shape, dtype)


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
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def lstm_dynamic(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h = gru_dynamic(x, hx, weights, scales, biases, num_layers, bidirectional, batch_first)
    return y, h, torch.empty_like(h)


def gru_dynamic(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    directions, hidden = 2 if bidirectional else 1, weights[1].shape[1]
    y = x.new_empty((*x.shape[:2], directions * hidden))
    return y, x.new_empty((num_layers * directions, x.shape[0 if batch_first else 1], hidden))


def max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    spatial = window_numbers(x, kernel_size, stride, padding, dilation, ceil_mode)
    shape = (*x.shape[: x.dim() - len(spatial)], *spatial)
    return _like_channels(x, x.dim(), shape, x.dtype)


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
    dilation = (1,) * len(kernel_size)
    return max_pool(x, kernel_size, stride, padding, dilation, ceil_mode).to(dtype)


def linear_accumulate(
    x: Tensor,
    x_zero_point: int,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=accumulator_dtype(x.dtype))


def conv_accumulate(
    x: Tensor,
    x_zero_point: int,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    shape = _conv_shape(x, weight, stride, padding, dilation, groups)
    return _like_channels(x, weight.dim(), shape, accumulator_dtype(x.dtype))


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
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=dtype)


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
    return matmul(a, 1.0, a_zero_point, b, b_scale, b_zero_point, 1.0, scale, 0, 0, 0, dtype)


def matmul_accumulate(a: Tensor, a_zero_point: int, b: Tensor, b_zero_point: int) -> Tensor:
    wide = accumulator_dtype(a.dtype, b.dtype)
    return matmul(a, 1.0, a_zero_point, b, 1.0, b_zero_point, 1.0, 1.0, 0, 0, 0, wide)


def rescale(
    x: Tensor,
    x_zero_point: int,
    multiplier: Tensor,
    shift: Tensor,
    axis: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def add_rescaled(
    a: Tensor,
    a_zero_point: int,
    a_multiplier: int,
    a_shift: int,
    b: Tensor,
    b_zero_point: int,
    b_multiplier: int,
    b_shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    left = a.to(torch.int64)
    return (left if a.shape == b.shape else left + b).to(dtype)


def softmax_i_vit(
    x: Tensor, x_zero_point: int, x0: int, n: int, bits: int, mask: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8 if bits <= 8 else torch.int16)


def softmax_table(
    x: Tensor,
    table: Tensor,
    numerator: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    mask: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def softmax_log2(
    x: Tensor,
    x_zero_point: int,
    x0: int,
    b: int,
    c: int,
    n: int,
    bits: int,
    mask: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int16)


def gelu_i_vit(x: Tensor, x_zero_point: int, x0: int, n: int, bits: int) -> Tensor:
    return x.new_empty(x.shape, dtype=accumulator_dtype(x.dtype))


def layer_norm(x: Tensor, x_zero_point: int, bias: Tensor | None, dims: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int64)


def layer_norm_power_of_two(
    x: Tensor, x_zero_point: int, channel_shift: Tensor, bias: Tensor | None, dims: int
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int64)


def normalize_integer(x: Tensor, x_zero_point: int, dim: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.int16)


def _conv_shape(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Sequence[int]:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return convolve(
        *_float_shapes(x, weight), None, tuple(stride), tuple(padding), tuple(dilation), groups
    ).shape


def _float_shapes(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fake float tensors of the same shapes: torch has no integer convolution to ask."""
    return (
        x.new_empty(x.shape, dtype=torch.float32),
        weight.new_empty(weight.shape, dtype=torch.float32),
    )


def _like_channels(
    x: Tensor, batched_rank: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """An empty result, laid out as the implementation lays it out."""
    batched = x.dim() == batched_rank
    layout = channel_memory_format(x) if batched else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
