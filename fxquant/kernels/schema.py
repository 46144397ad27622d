"""The operators ``torch.ops.fxquant.*``: one table of schemas, implementations and fake kernels.

The implementation on the CPU is the reference in `fxquant.integer`. There is none for other
devices on purpose: float64 convolutions elsewhere need not be plain sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import integer
from fxquant.integer.pooling import window_numbers
from fxquant.integer.rounding import channel_memory_format

NAMESPACE = "fxquant"

_X = "Tensor x, float x_scale, int x_zero_point"
_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias"
_OUTPUT = "float scale, int zero_point, int qmin, int qmax, ScalarType dtype"
_RESIDUAL = "Tensor? residual=None, float residual_scale=1.0, int residual_zero_point=0"
_A_B = (
    "Tensor a, float a_scale, int a_zero_point, Tensor b, float b_scale, int b_zero_point, "
    f"{_OUTPUT}"
)


@dataclass(frozen=True)
class Operator:
    """One operator: its schema, what it computes, and what it returns for fake tensors.

    Without ``fake`` the implementation itself runs on fake tensors: it looks at shapes only.
    """

    schema: str
    implementation: Callable[..., Any]
    fake: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The name inside the namespace."""
        return self.schema.partition("(")[0]


def _fake_conv(
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
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    shape = convolve(
        *_float_shapes(x, weight), None, tuple(stride), tuple(padding), tuple(dilation), groups
    ).shape
    return _like_channels(x, weight.dim(), shape, dtype)


def _fake_conv_transpose(
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


def _fake_linear(
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


def _fake_linear_dynamic(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_lstm_dynamic(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h = _fake_gru_dynamic(x, hx, weights, scales, biases, num_layers, bidirectional, batch_first)
    return y, h, torch.empty_like(h)


def _fake_gru_dynamic(
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


def _fake_max_pool(
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


def _fake_avg_pool(
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
    return _fake_max_pool(x, kernel_size, stride, padding, dilation, ceil_mode).to(dtype)


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


_CONV = "int[] stride, int[] padding, int[] dilation, int groups"
_CONV_TRANSPOSE = f"{_CONV}, int[] output_padding"
_RECURRENT = (
    "Tensor x, Tensor[] hx, Tensor[] weights, Tensor[] scales, Tensor[] biases, int num_layers, "
    "bool bidirectional, bool batch_first"
)
_POOL = (
    "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    "int? divisor_override"
)

OPERATORS: tuple[Operator, ...] = (
    Operator(f"quantize(Tensor x, {_OUTPUT}) -> Tensor", integer.quantize),
    Operator("dequantize(Tensor q, float scale, int zero_point) -> Tensor", integer.dequantize),
    Operator(
        "dequantize_weight(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
        "int axis) -> Tensor",
        integer.dequantize_weight,
    ),
    Operator(f"requantize({_X}, {_OUTPUT}) -> Tensor", integer.requantize),
    Operator(
        f"conv({_X}, {_WEIGHT}, {_CONV}, {_OUTPUT}, {_RESIDUAL}) -> Tensor",
        integer.conv,
        _fake_conv,
    ),
    Operator(
        f"conv_transpose({_X}, {_WEIGHT}, {_CONV_TRANSPOSE}, {_OUTPUT}, {_RESIDUAL}) -> Tensor",
        integer.conv_transpose,
        _fake_conv_transpose,
    ),
    Operator(
        f"linear({_X}, {_WEIGHT}, {_OUTPUT}, {_RESIDUAL}) -> Tensor",
        integer.linear,
        _fake_linear,
    ),
    Operator(f"add({_A_B}) -> Tensor", integer.add),
    Operator(f"mul({_A_B}) -> Tensor", integer.mul),
    Operator(
        f"channel_affine({_X}, Tensor weight, Tensor bias, {_OUTPUT}) -> Tensor",
        integer.channel_affine,
    ),
    Operator("lookup(Tensor x, Tensor table) -> Tensor", integer.lookup),
    Operator(f"avg_pool({_X}, {_POOL}, {_OUTPUT}) -> Tensor", integer.avg_pool, _fake_avg_pool),
    Operator(
        f"adaptive_avg_pool({_X}, int[] output_size, {_OUTPUT}) -> Tensor",
        integer.adaptive_avg_pool,
    ),
    Operator(
        "max_pool(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
        "bool ceil_mode) -> Tensor",
        integer.max_pool,
        _fake_max_pool,
    ),
    Operator(f"mean({_X}, int[] dim, bool keepdim, {_OUTPUT}) -> Tensor", integer.mean),
    Operator(
        "linear_dynamic(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
        integer.linear_dynamic,
        _fake_linear_dynamic,
    ),
    Operator(
        f"lstm_dynamic({_RECURRENT}) -> (Tensor, Tensor, Tensor)",
        integer.lstm_dynamic,
        _fake_lstm_dynamic,
    ),
    Operator(
        f"gru_dynamic({_RECURRENT}) -> (Tensor, Tensor)", integer.gru_dynamic, _fake_gru_dynamic
    ),
)


def register() -> None:
    """Make every operator of the table known to torch; those that it knows already stay."""
    for operator in OPERATORS:
        if hasattr(getattr(torch.ops, NAMESPACE), operator.name):
            continue
        qualified = f"{NAMESPACE}::{operator.name}"
        # torch.library's functions keep what they register alive for the whole process, which a
        # Library object of this module would not: reloading the module would unregister it.
        torch.library.define(
            qualified, operator.schema.removeprefix(operator.name), tags=torch.Tag.pt2_compliant_tag
        )
        torch.library.impl(qualified, "cpu", operator.implementation)
        torch.library.register_fake(qualified, operator.fake or operator.implementation)


register()
