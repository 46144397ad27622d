"""Functions of one 8-bit value on x86: the kernel that computes a table, or the table itself.

Torch's kernels compute in float32 on the fly. All that such a kernel can be given are 256 codes,
so whether it may stand for a table is not a matter of names: it is tried on every code.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.x86.kernels import as_quantized, codes

__all__ = ["TableKernel", "find_kernel", "lookup", "pair_table"]

ATEN: Any = torch.ops.aten
Q: Any = torch.ops.quantized


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
    """What gives a table's codes: ``target(x, *arguments)`` on a quantized tensor.

    With `in_float` the target takes the dequantized values, which it may write over, and the
    result is quantized: in vectors and on all threads, which a look-up is not.
    """

    target: Any
    arguments: tuple[Any, ...] = ()
    in_float: bool = False

    def __call__(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Of a quantized tensor, onto the grid of `scale` and `zero_point`."""
        if not self.in_float:
            result: Tensor = self.target(x, *self.arguments)
            return result
        floats = self.target(x.dequantize(), *self.arguments)
        return torch.quantize_per_tensor(floats, scale, zero_point, torch.quint8)


_IN_FLOAT = tuple(
    TableKernel(function, in_float=True)
    for function in (
        ATEN.relu_.default,
        ATEN.silu_.default,
        ATEN.hardsigmoid_.default,
        ATEN.tanh_.default,
        ATEN.gelu_.default,
        ATEN.mish_.default,
        ATEN.leaky_relu_.default,
        ATEN.elu_.default,
        ATEN.softplus.default,
        ATEN.square_.default,
        ATEN.exp_.default,
        ATEN.neg_.default,
        ATEN.abs_.default,
    )
)


# Float rounding moves codes next to a tie. Another function that happens to be near moves more.
_MOST_DIFFERING = 8


def find_kernel(
    table: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: int
) -> TableKernel | None:
    """The fastest kernel that gives the table's codes, but for some that are one step off.

    None where there is none; then `lookup` takes the table as it is.
    """
    output = (scale, zero_point)
    candidates = [
        TableKernel(kernel, output) for kernel in (Q.hardswish.default, Q.sigmoid.default)
    ]
    if (x_scale, x_zero_point) == output:
        low, high = ((int(code) - zero_point) * scale for code in (table.min(), table.max()))
        candidates.insert(0, TableKernel(torch.clamp, (low, high)))
    x = as_quantized(torch.arange(256, dtype=torch.uint8), x_scale, x_zero_point)
    wanted = table.to(torch.int32)
    for candidate in (*candidates, *_IN_FLOAT):
        found = codes(candidate(x, *output)).to(torch.int32)
        steps = (found - wanted).abs()
        if int(steps.max()) <= 1 and int(steps.sum()) <= _MOST_DIFFERING:
            return candidate
    return None
