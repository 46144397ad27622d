"""Torch's int8 kernels, packed: which engine each layer takes, and what their quirks are.

Measured on CPUs with AVX-512 VNNI:
- convolutions are fastest and exact with oneDNN's packing; FBGEMM's depthwise kernel saturates;
- linear layers are exact with FBGEMM's packing at any zero point, and fastest in the raw oneDNN
  operator where there are enough products;
- a oneDNN packed object remembers the first primitive that it ran, whatever operation that was,
  so every call site packs its own;
- `conv2d_add*` look at the global engine when they run, the others at the packed object;
- `conv2d_add*` write their result over the residual where that is channels-last.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.x86 import scripted
from fxquant.backends.x86.traceable import traceable, traced_as

__all__ = [
    "add_rounded",
    "as_quantized",
    "centered",
    "coarser",
    "codes",
    "conv_add",
    "conv_add_relu",
    "engine",
    "onednn",
    "pack_conv",
    "pack_linear",
    "quantized_weight",
    "rounded",
]


def _spend_deprecation_warning() -> None:
    """Make torch say once, unheard, that quantized tensors will be removed some day.

    It is our matter and not the user's: the kernels work in every release that we test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


_spend_deprecation_warning()


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Torch's quantized engine set to `name` inside the block."""
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


def quantized_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int = 0
) -> Tensor:
    """An int8 weight as a torch quantized tensor, per channel or per tensor."""
    if scale.numel() == 1:
        zero = 0 if zero_point is None else int(zero_point)
        return torch._make_per_tensor_quantized_tensor(weight, float(scale), zero)
    zeros = torch.zeros(scale.numel(), dtype=torch.long) if zero_point is None else zero_point
    return torch._make_per_channel_quantized_tensor(
        weight.contiguous(), scale.double(), zeros.long(), axis
    )


def pack_conv(
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[list[int]],
    groups: int,
    *,
    engine_name: str,
) -> Any:
    """A convolution's weights in the kernel's layout; `weight` from `quantized_weight`.

    `geometry` is stride, padding and dilation.
    """
    prepack = getattr(torch.ops.quantized, f"conv{weight.dim() - 2}d_prepack")
    with engine(engine_name):
        return prepack(weight, bias, *geometry, groups)


def pack_linear(weight: Tensor, bias: Tensor | None) -> Any:
    """A linear layer's weights in FBGEMM's layout."""
    with engine("fbgemm"):
        return torch.ops.quantized.linear_prepack(weight, bias)


_get_engine = torch._C._get_qengine
_set_engine = torch._C._set_qengine
_ONEDNN = 3  # at::QEngine::ONEDNN
_CONV_ADD = torch.ops.quantized.conv2d_add.default
_CONV_ADD_RELU = torch.ops.quantized.conv2d_add_relu.default


class _OneDnn:
    """oneDNN as torch's engine while any thread is inside: the setting is the whole process's."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._previous = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._previous = _get_engine()
                _set_engine(_ONEDNN)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _set_engine(self._previous)


onednn = _OneDnn()


# The whole run of a traced graph sets the engine, which these set for one call.
@traced_as(_CONV_ADD)
def conv_add(x: Tensor, residual: Tensor, packed: Any, scale: float, zero_point: int) -> Tensor:
    """``conv2d(x) + residual`` on quantized tensors."""
    with onednn:
        return _CONV_ADD(x, residual, packed, scale, zero_point)  # type: ignore[no-any-return]


@traced_as(_CONV_ADD_RELU)
def conv_add_relu(
    x: Tensor, residual: Tensor, packed: Any, scale: float, zero_point: int
) -> Tensor:
    """``relu(conv2d(x) + residual)`` on quantized tensors."""
    with onednn:
        return _CONV_ADD_RELU(  # type: ignore[no-any-return]
            x, residual, packed, scale, zero_point
        )


@traced_as(scripted.codes)
def codes(x: Tensor) -> Tensor:
    """The integers of a quint8 tensor, in its own memory: what `int_repr` copies, one by one.

    Nothing may write into either tensor while the other is needed.
    """
    return torch.empty(0, dtype=torch.uint8).set_(
        x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )


@traced_as(scripted.as_quantized)
def as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quint8 tensor of the integers of a uint8 tensor, in its memory: the way back of `codes`."""
    empty = torch._empty_affine_quantized(
        [0], scale=scale, zero_point=zero_point, dtype=torch.quint8
    )
    return empty.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


@traced_as(scripted.centered)
def centered(x: Tensor, zero_point: int) -> Tensor:
    """``float32(q - z)`` of uint8 codes, in one vectorized pass, which `to` and `sub` are not."""
    return as_quantized(x, 1.0, zero_point).dequantize()


@traceable
def rounded(real: Tensor, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Values in steps, which are written over, as codes of `dtype` in [low, high]."""
    return real.round_().add_(zero_point).clamp_(low, high).to(dtype)


@traceable
def coarser(x: Tensor, steps: Tensor) -> Tensor:
    """`x`, which is not written over, rounded to 8-bit multiples of each channel's step."""
    return x.div(steps).round_().clamp_(-128, 127).mul_(steps)


@traceable
def add_rounded(
    a: Tensor,
    a_zero_point: int,
    a_factor: float,
    b: Tensor,
    b_zero_point: int,
    b_factor: float,
    zero_point: int,
    low: int,
    high: int,
    dtype: torch.dtype,
) -> Tensor:
    """The sum of two tensors of codes, each times its factor and rounded on its own."""
    left = _rounded_branch(a, a_zero_point, a_factor)
    right = _rounded_branch(b, b_zero_point, b_factor)
    return (left + right).add_(zero_point).clamp_(low, high).to(dtype)


def _rounded_branch(x: Tensor, zero_point: int, factor: float) -> Tensor:
    wide = x.to(torch.float64)
    if zero_point:
        wide.sub_(zero_point)
    return wide.mul_(factor).round_()
