"""Everything on integers alone: exact accumulators, then multiplication by f / 2^e and rounding.

No scale is left in the graph, and no float tensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxquant.integer import dyadic, dyadic_tensors
from fxquant.plan.operations import ADAPTIVE_AVERAGES, AVERAGES, Kind
from fxquant.to_integer.conversion import OPS, Conversion, Integers
from fxquant.to_integer.grid import Grid
from fxquant.to_integer.layers import geometry, layer_integers, output_bounds
from fxquant.to_integer.operations import Emit, dimensions_of, emit_table, mean_dims, window
from passes import add_relu, tensor_info
from passes.attention.functions import scaled_matmul

__all__ = ["DYADIC_EMITTERS", "rescale"]


def rescale(
    conversion: Conversion,
    accumulators: fx.Node,
    scale: Tensor,
    grid: Grid,
    *,
    axis: int,
    bounds: tuple[int, int] | None = None,
) -> fx.Node:
    """Integers of value ``scale · a`` onto `grid`; `scale` is float64 [1], or [C] along `axis`."""
    multiplier, shift = dyadic_tensors(scale.double() / grid.scale)
    path = f"rescale.{conversion.current.name}"
    low, high = bounds or (grid.qmin, grid.qmax)
    args = (
        accumulators,
        0,
        conversion.constant(f"{path}.multiplier", multiplier),
        conversion.constant(f"{path}.shift", shift),
        axis,
        grid.zero_point,
        low,
        high,
        grid.dtype,
    )
    return conversion.emit(OPS.rescale.default, args, grid)


def _accumulate(conversion: Conversion, operator: Any, *args: Any) -> fx.Node:
    return conversion.emit(operator, args, None, f"{conversion.current.name}_accumulators")


def _layer(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    found = layer_integers(conversion, node, grid)
    layer, x = found.layer, found.x
    operands = (x.node, x.grid.zero_point, found.weight, found.zero_point, found.bias)
    if isinstance(layer, nn.Linear):
        sums = _accumulate(conversion, OPS.linear_accumulate.default, *operands)
    else:
        sums = _accumulate(conversion, OPS.conv_accumulate.default, *operands, *geometry(layer))
    axis = -1 if isinstance(layer, nn.Linear) else 1
    bounds = output_bounds(conversion, node, grid)
    scale = found.scale.double() * x.grid.scale
    return rescale(conversion, sums, scale, grid, axis=axis, bounds=bounds)


def _matmul(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    a, b = _operands(conversion, node)
    operands = (a.node, a.grid.zero_point, b.node, b.grid.zero_point)
    sums = _accumulate(conversion, OPS.matmul_accumulate.default, *operands)
    factor = float(node.kwargs.get("scale", 1.0))  # type: ignore[arg-type]
    return rescale(conversion, sums, _one(a.grid.scale * b.grid.scale * factor), grid, axis=-1)


def _mul(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    a, b = _operands(conversion, node)
    operands = (a.node, a.grid.zero_point, b.node, b.grid.zero_point)
    products = _accumulate(conversion, OPS.mul_accumulate.default, *operands)
    return rescale(conversion, products, _one(a.grid.scale * b.grid.scale), grid, axis=-1)


def _add(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    low = max(grid.qmin, grid.zero_point) if node.target is add_relu else grid.qmin
    a, b = (
        (value.node, value.grid.zero_point, *dyadic(value.grid.scale / grid.scale))
        for value in _operands(conversion, node)
    )
    output = (grid.zero_point, low, grid.qmax, grid.dtype)
    return conversion.emit(OPS.add_rescaled.default, (*a, *b, *output), grid)


def _mean(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    return _average(conversion, node, grid, *mean_dims(node))


def _global_average(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    return _average(conversion, node, grid, list(range(-dimensions_of(node), 0)), True)


def _average(
    conversion: Conversion, node: fx.Node, grid: Grid, dims: list[int], keepdim: bool
) -> fx.Node:
    x = conversion.integers[cast(fx.Node, node.args[0])]
    info = tensor_info(node.args[0])
    assert info is not None
    count = 1
    for dim in dims:
        count *= info.shape[dim]
    operands = (x.node, x.grid.zero_point, dims, keepdim)
    sums = _accumulate(conversion, OPS.sum_accumulate.default, *operands)
    return rescale(conversion, sums, _one(x.grid.scale / count), grid, axis=-1)


def _average_windows(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    """An average over windows is a depthwise convolution with ones."""
    x = conversion.integers[cast(fx.Node, node.args[0])]
    info = tensor_info(node.args[0])
    assert info is not None
    dimensions, channels = dimensions_of(node), info.shape[1]
    kernel, stride, padding = window(node.kwargs, dimensions)
    ones = torch.ones(channels, 1, *kernel, dtype=torch.int8)
    weight = conversion.constant(f"rescale.{node.name}.ones", ones)
    operands = (x.node, x.grid.zero_point, weight, None, None)
    shape = (stride, padding, [1] * dimensions, channels)
    sums = _accumulate(conversion, OPS.conv_accumulate.default, *operands, *shape)
    return rescale(conversion, sums, _one(x.grid.scale / ones[0].numel()), grid, axis=1)


def _operands(conversion: Conversion, node: fx.Node) -> list[Integers]:
    return [conversion.integers[cast(fx.Node, operand)] for operand in node.args]


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


DYADIC_EMITTERS: dict[Any, Emit] = {
    Kind.LAYER: _layer,
    Kind.TABLE: emit_table,
    torch.add: _add,
    add_relu: _add,
    torch.mul: _mul,
    **dict.fromkeys((torch.matmul, scaled_matmul), _matmul),
    torch.mean: _mean,
    **dict.fromkeys(AVERAGES, _average_windows),
    **dict.fromkeys(ADAPTIVE_AVERAGES, _global_average),
}
"""How an operation writes the integers of a grid with integers alone; see `Row.alone`."""
