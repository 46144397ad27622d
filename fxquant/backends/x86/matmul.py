"""Products of two activations: float32 products of integers, which are exact sums.

Torch has no batched product of 8-bit integers. Its float32 product of the centred codes is exact
while the sums stay below 2^24, whatever their order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.backends.x86 import kernels
from fxquant.backends.x86.lowering import Lowered, Lowering
from fxquant.backends.x86.traceable import traceable
from fxquant.kernels.calls import operator_arguments
from fxquant.to_integer import Grid
from passes import masked_softmax, tensor_info

__all__ = [
    "centered",
    "fits_float32",
    "lower_matmul",
    "lower_weighted_mean",
    "mean_product",
    "product",
]

OPS: Any = torch.ops.fxquant
_EXACT = 2**24


@traceable
def product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """``factor · (a @ b)`` of float32 tensors, broadcast like matmul."""
    if a.dim() < 3 or a.shape[:-2] != b.shape[:-2]:
        return torch.matmul(a, b).mul_(factor)
    *batch, rows, depth = a.shape
    # The kernel applies the factor as it writes.
    result = torch.baddbmm(
        a.new_empty(1),
        a.reshape(-1, rows, depth),
        b.reshape(-1, depth, b.shape[-1]),
        beta=0,
        alpha=factor,
    )
    return result.view(*batch, rows, b.shape[-1])


def lower_matmul(lowering: Lowering, node: fx.Node) -> Lowered:
    """A product whose sums float32 holds; float32 accumulators where nothing quantizes it."""
    arguments = operator_arguments(node)
    a, b = arguments["a"], arguments["b"]
    if not fits_float32(a, b):
        return None
    factor = arguments["a_scale"] * arguments["b_scale"] * arguments["alpha"]
    products = lowering.emit(product, centered(lowering, a), centered(lowering, b), factor)
    if arguments["dtype"] == torch.float32:
        return products
    output = (arguments["scale"], arguments["zero_point"])
    q = lowering.emit(torch.quantize_per_tensor, products, *output, torch.quint8)
    return lowering.clamp(q, node, arguments["qmin"], arguments["qmax"])


@traceable
def mean_product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """``factor · (a @ b) / Σ a`` of float32 tensors; 0 for a row of zeros."""
    total = a.sum(-1, keepdim=True)
    # Sums of codes are whole numbers: only a row of zeros is changed.
    return product(a, b, factor).div_(total.clamp_(min=1.0))


def lower_weighted_mean(lowering: Lowering, node: fx.Node) -> Lowered:
    """A product divided by its weights' sums.

    Where sums pass 2^24, float32 rounds them by less than a thousandth of a step.
    """
    arguments = operator_arguments(node)
    a, b = arguments["a"], arguments["b"]
    if any(source.meta["grid"].dtype != torch.uint8 for source in (a, b)):
        return None
    operands = (centered(lowering, a), centered(lowering, b), arguments["b_scale"])
    means = lowering.emit(mean_product, *operands)
    if arguments["dtype"] == torch.float32:
        return means
    output = (arguments["scale"], arguments["zero_point"])
    q = lowering.emit(torch.quantize_per_tensor, means, *output, torch.quint8)
    return lowering.clamp(q, node, arguments["qmin"], arguments["qmax"])


def centered(lowering: Lowering, node: fx.Node) -> fx.Node:
    """An integer value as floats ``q - z``, made once."""
    if node not in lowering.centered:
        codes, zero_point = lowering.plain(node), node.meta["grid"].zero_point
        made = lowering.graph.call_function(kernels.centered, (codes, zero_point))
        lowering.centered[node] = made
    return lowering.centered[node]


def fits_float32(a: fx.Node, b: fx.Node) -> bool:
    """Whether float32 holds the sums: by the operands' grids, and the depth on the probe."""
    grids: list[Grid] = [a.meta["grid"], b.meta["grid"]]
    info = tensor_info(a)
    if any(grid.dtype != torch.uint8 for grid in grids) or info is None:
        return False
    row: float = _reach(grids[0]) * info.shape[-1]
    if _is_softmax(a) and not grids[0].zero_point:
        # A row sums to 1, and rounding at most doubles what it does not take away.
        row = min(row, 2 / grids[0].scale)
    return row * _reach(grids[1]) < _EXACT


def _is_softmax(node: fx.Node) -> bool:
    """Whether a value is the codes of a softmax over its last dimension."""
    if node.target is OPS.softmax_table.default:
        return True
    source = node.args[0] if node.target is OPS.quantize.default else None
    if not isinstance(source, fx.Node) or source.target not in (F.softmax, masked_softmax):
        return False
    return bool(source.kwargs.get("dim") == -1)


def _reach(grid: Grid) -> int:
    return max(grid.zero_point - grid.qmin, grid.qmax - grid.zero_point)
