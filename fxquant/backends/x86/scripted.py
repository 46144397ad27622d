"""Calls that a trace cannot hold as Python makes them, as TorchScript functions, which it can.

A trace has no optional numbers, which the raw linear operator takes a list of, and no storages;
and the sizes that it hands to `set_` are constants of its example.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_quantized", "centered", "codes", "raw_linear"]

_SOURCE = """
def raw_linear(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor,
    weight_zero_point: Tensor, bias: Optional[Tensor], scale: float, zero_point: int, dtype: int,
    post_operation: str, algorithm: str
) -> Tensor:
    none = torch.jit.annotate(List[Optional[number]], [])
    return torch.ops.onednn.qlinear_pointwise(
        x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, bias, scale, zero_point,
        dtype, post_operation, none, algorithm
    )

def codes(x: Tensor, dtype: int) -> Tensor:
    flat = x.contiguous().view(-1)
    empty = torch.empty([0], dtype=dtype)
    return empty.set_(flat, flat.storage_offset(), flat.size(), [1]).view(x.size())

def as_quantized(x: Tensor, scale: float, zero_point: int, dtype: int) -> Tensor:
    flat = x.contiguous().view(-1)
    empty = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=dtype)
    return empty.set_(flat, flat.storage_offset(), flat.size(), [1]).view(x.size())
"""
# As TorchScript, which has no value for a type, writes them.
_NUMBERS = {torch.uint8: 0, torch.float32: 6, torch.quint8: 13}


@functools.cache
def _compiled() -> Any:
    return torch.jit.CompilationUnit(_SOURCE)


def raw_linear(*arguments: Any) -> Tensor:
    """oneDNN's raw operator, its arguments in order."""
    *operands, dtype, post_operation, _, algorithm = arguments
    found: Tensor = _compiled().raw_linear(*operands, _NUMBERS[dtype], post_operation, algorithm)
    return found


def codes(x: Tensor) -> Tensor:
    """`kernels.codes`; a layout that is not contiguous is copied, channels last is kept."""
    return _keeping_channels_last(x, lambda y: _compiled().codes(y, _NUMBERS[torch.uint8]))


def as_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """`kernels.as_quantized`; layouts as in `codes`."""
    number = _NUMBERS[torch.quint8]
    return _keeping_channels_last(
        x, lambda y: _compiled().as_quantized(y, scale, zero_point, number)
    )


def centered(x: Tensor, zero_point: int) -> Tensor:
    """`kernels.centered`."""
    return as_quantized(x, 1.0, zero_point).dequantize()


def _keeping_channels_last(x: Tensor, call: Any) -> Tensor:
    if not x.is_contiguous() and x.dim() == 4 and x.permute(0, 2, 3, 1).is_contiguous():
        found: Tensor = call(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return found
    result: Tensor = call(x)
    return result
