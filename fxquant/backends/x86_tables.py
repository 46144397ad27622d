"""Functions of one 8-bit value on x86: the kernel that computes a table, or the table itself.

Torch's kernels compute in float32 on the fly. All that such a kernel can be given are 256 codes,
so whether it may stand for a table is not a matter of names: it is tried on every code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86_kernels import as_quantized, codes

__all__ = ["TableKernel", "find_kernel", "lookup", "pair_table", "through_float"]

Q: Any = torch.ops.quantized


def through_float(
    x: Tensor, function: Callable[[Tensor], Tensor], scale: float, zero_point: int
) -> Tensor:
    """`function`, which may write over what it is given, of the values of a quantized tensor.

    All three steps run in vectors on all threads, which a look-up does not.
    """
    y = function(x.dequantize())
    return torch.quantize_per_tensor(y, scale, zero_point, torch.quint8)


def lookup(x: Tensor, table: Tensor, pairs: Tensor, scale: float, zero_point: int) -> Tensor:
    """``table[q]`` of every code of a quantized tensor, as a quantized tensor.

    `table` is uint8 [256], and `pairs` is its `pair_table`: half as many look-ups.
    """
    plain = codes(x)
    if not (x.is_contiguous() or (x.dim() == 4 and plain.stride() == _channels_last(plain))):
        plain = plain.contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))
    if flat.numel() % 2 or flat.storage_offset() % 2:
        found = table.index_select(0, flat.to(torch.int32))
    else:
        wide = flat.view(torch.uint16).to(torch.int32)
        found = pairs.index_select(0, wide).view(torch.uint8)
    return as_quantized(found.as_strided(plain.shape, plain.stride()), scale, zero_point)


def _channels_last(x: Tensor) -> tuple[int, ...]:
    _, channels, height, width = x.shape
    return (height * width * channels, 1, width * channels, channels)


def pair_table(table: Tensor) -> Tensor:
    """The table of two neighbouring codes at once: int16 [65536]."""
    first = torch.arange(2**16) % 256
    second = torch.arange(2**16) // 256
    if sys.byteorder == "big":
        first, second = second, first
    return torch.stack([table[first], table[second]], dim=1).view(torch.int16).flatten()


@dataclass(frozen=True)
class TableKernel:
    """A call that gives a table's codes: ``target(x, *arguments)`` on a quantized tensor."""

    target: Any
    arguments: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Of a quantized tensor."""
        result: Tensor = self.target(x, *self.arguments)
        return result


_KERNELS: tuple[Any, ...] = (Q.hardswish.default, Q.sigmoid.default)
_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu_,
    torch.ops.aten.silu_.default,
    torch.ops.aten.hardsigmoid_.default,
    torch.tanh_,
    F.gelu,
    torch.ops.aten.mish_.default,
    torch.ops.aten.elu_.default,
    torch.ops.aten.leaky_relu_.default,
    F.softplus,
    torch.square_,
    torch.exp_,
)


def find_kernel(
    table: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: int
) -> TableKernel | None:
    """The fastest kernel whose codes are at most one step from the table's, for every code.

    None where there is none; then `lookup` takes the table as it is.
    """
    output = (scale, zero_point)
    candidates = [TableKernel(kernel, output) for kernel in _KERNELS]
    candidates += [TableKernel(through_float, (function, *output)) for function in _FUNCTIONS]
    if (x_scale, x_zero_point) == output:
        low, high = ((int(code) - zero_point) * scale for code in (table.min(), table.max()))
        candidates.insert(0, TableKernel(torch.clamp, (low, high)))
    x = as_quantized(torch.arange(256, dtype=torch.uint8), x_scale, x_zero_point)
    wanted = table.to(torch.int32)
    for candidate in candidates:
        if bool(((codes(candidate(x)).to(torch.int32) - wanted).abs() <= 1).all()):
            return candidate
    return None
