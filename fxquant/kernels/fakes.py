"""What the operators return for fake tensors: empty tensors of the right shape, type and layout.

Each function takes one `Call`: the arguments of an operator by the names of its schema. An
operator without one here runs its own implementation: it looks at shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.integer.bounds import accumulator_dtype
from fxquant.integer.pooling import window_numbers
from fxquant.integer.rounding import channel_memory_format

# ruff: noqa: D103


class Call(SimpleNamespace):
    """The arguments of a call by name, defaults filled in."""


def conv(call: Call) -> Tensor:
    return _convolution(call, call.dtype)


def conv_accumulate(call: Call) -> Tensor:
    return _convolution(call, accumulator_dtype(call.x.dtype))


def conv_transpose(call: Call) -> Tensor:
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[call.weight.dim() - 3]
    shape = convolve(
        *_float_shapes(call.x, call.weight),
        None,
        tuple(call.stride),
        tuple(call.padding),
        tuple(call.output_padding),
        call.groups,
        tuple(call.dilation),
    ).shape
    return _like_channels(call.x, call.weight.dim(), shape, call.dtype)


def linear(call: Call) -> Tensor:
    return _rows(call, call.dtype)


def linear_accumulate(call: Call) -> Tensor:
    return _rows(call, accumulator_dtype(call.x.dtype))


def linear_dynamic(call: Call) -> Tensor:
    return _rows(call, call.x.dtype)


def lstm_dynamic(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    y, h = gru_dynamic(call)
    return y, h, torch.empty_like(h)


def gru_dynamic(call: Call) -> tuple[Tensor, Tensor]:
    x, hidden = call.x, call.weights[1].shape[1]
    directions = 2 if call.bidirectional else 1
    y = x.new_empty((*x.shape[:2], directions * hidden))
    batch = x.shape[0 if call.batch_first else 1]
    return y, x.new_empty((call.num_layers * directions, batch, hidden))


def max_pool(call: Call) -> Tensor:
    return _windows(call, call.dilation, call.x.dtype)


def avg_pool(call: Call) -> Tensor:
    return _windows(call, (1,) * len(call.kernel_size), call.dtype)


def matmul(call: Call) -> Tensor:
    return _product(call.a, call.b, call.dtype)


def matmul_accumulate(call: Call) -> Tensor:
    return _product(call.a, call.b, accumulator_dtype(call.a.dtype, call.b.dtype))


def rescale(call: Call) -> Tensor:
    return torch.empty_like(call.x, dtype=call.dtype)


def add_rescaled(call: Call) -> Tensor:
    left = call.a.to(torch.int64)
    result: Tensor = left if call.a.shape == call.b.shape else left + call.b
    return result.to(call.dtype)


def softmax_i_vit(call: Call) -> Tensor:
    return _contiguous(call.x, torch.uint8 if call.bits <= 8 else torch.int16)


def softmax_table(call: Call) -> Tensor:
    return _contiguous(call.x, call.dtype)


def softmax_log2(call: Call) -> Tensor:
    return _contiguous(call.x, torch.int16)


def gelu_i_vit(call: Call) -> Tensor:
    return _contiguous(call.x, accumulator_dtype(call.x.dtype))


def layer_norm(call: Call) -> Tensor:
    return _contiguous(call.x, torch.int64)


def normalize_integer(call: Call) -> Tensor:
    return torch.empty_like(call.x, dtype=torch.int16)


def _convolution(call: Call, dtype: torch.dtype) -> Tensor:
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[call.weight.dim() - 3]
    geometry = (tuple(call.stride), tuple(call.padding), tuple(call.dilation), call.groups)
    shape = convolve(*_float_shapes(call.x, call.weight), None, *geometry).shape
    return _like_channels(call.x, call.weight.dim(), shape, dtype)


def _rows(call: Call, dtype: torch.dtype) -> Tensor:
    result: Tensor = call.x.new_empty((*call.x.shape[:-1], call.weight.shape[0]), dtype=dtype)
    return result


def _windows(call: Call, dilation: Sequence[int], dtype: torch.dtype) -> Tensor:
    x = call.x
    spatial = window_numbers(
        x, call.kernel_size, call.stride, call.padding, dilation, call.ceil_mode
    )
    shape = (*x.shape[: x.dim() - len(spatial)], *spatial)
    return _like_channels(x, x.dim(), shape, dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=dtype)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


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
