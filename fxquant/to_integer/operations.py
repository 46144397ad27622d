"""Everything but layers on integers: one emitter for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.integer import build_table
from fxquant.plan.operations import ADAPTIVE_AVERAGES, AVERAGES, Kind, table_function
from fxquant.to_integer.conversion import OPS, Conversion, Integers
from fxquant.to_integer.grid import Grid
from fxquant.to_integer.layers import emit_layer, output_bounds
from passes import add_relu, weighted_mean
from passes.attention.functions import scaled_matmul

__all__ = ["EMITTERS", "Emit", "emit_matmul", "emit_movement", "emit_table"]


Emit = Callable[[Conversion, fx.Node, Grid], fx.Node]
"""Emits the operation of a simulated node on integers that lie on a grid."""


def emit_movement(conversion: Conversion, node: fx.Node) -> None:
    """Emit a movement or selection of integers: the same call on the integers themselves."""
    operand = next(source for source in node.all_input_nodes if source in conversion.integers)
    grid = conversion.integers[operand].grid
    args = fx.map_arg(node.args, conversion.movable)
    kwargs = dict(fx.map_arg(node.kwargs, conversion.movable))
    if node.target is F.pad and kwargs.get("mode", "constant") == "constant":
        kwargs["value"] = grid.zero_point
    target: Any = node.target
    if target in (F.max_pool1d, F.max_pool2d, F.max_pool3d):
        emitted = _emit_max_pool(conversion, node, args[0], kwargs, grid)
    elif target is F.interpolate and grid.dtype != torch.uint8:
        # Torch repeats no 16-bit integers; the floats that they stand for give them back.
        floats = conversion.emit(OPS.dequantize.default, (args[0], *grid.input), None)
        repeated = conversion.graph.create_node("call_function", target, (floats,), kwargs)
        emitted = conversion.emit(
            OPS.quantize.default, (conversion.annotate(repeated, None), *grid.output()), grid
        )
    else:
        emitted = conversion.graph.create_node(node.op, target, args, kwargs, name=node.name)
        conversion.annotate(emitted, grid)
    conversion.integers[node] = Integers(emitted, grid)


def _emit_max_pool(
    conversion: Conversion, node: fx.Node, x: Any, kwargs: dict[str, Any], grid: Grid
) -> fx.Node:
    dimensions = dimensions_of(node)
    args = (
        x,
        *window(kwargs, dimensions),
        expand(kwargs.get("dilation", 1), dimensions),
        bool(kwargs.get("ceil_mode", False)),
    )
    return conversion.emit(OPS.max_pool.default, args, grid)


def _emit_layer_on(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    bounds = output_bounds(conversion, node, grid)
    return emit_layer(conversion, node, grid.output(*bounds), grid)


def emit_matmul(
    conversion: Conversion, node: fx.Node, output: tuple[Any, ...], grid: Grid | None
) -> fx.Node:
    """A product of two activations whose integer result is written as `output` says."""
    a, b = (conversion.integers[cast(fx.Node, operand)] for operand in node.args)
    if node.target is weighted_mean:
        operands = (a.node, a.grid.zero_point, b.node, *b.grid.input)
        return conversion.emit(OPS.weighted_mean.default, (*operands, *output), grid)
    alpha = float(node.kwargs.get("scale", 1.0))  # type: ignore[arg-type]
    args = (a.node, *a.grid.input, b.node, *b.grid.input, alpha, *output)
    return conversion.emit(OPS.matmul.default, args, grid)


def _emit_matmul_on(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    return emit_matmul(conversion, node, grid.output(), grid)


def _emit_affine(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    path = str(node.target)
    norm: Any = conversion.source.get_submodule(path)
    x = conversion.integers[node.all_input_nodes[0]]
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    gamma = norm.weight.double() if norm.weight is not None else torch.ones_like(deviation)
    beta = norm.bias.double() if norm.bias is not None else torch.zeros_like(deviation)
    weight = (gamma / deviation).detach()
    bias = (beta - norm.running_mean.double() * weight).detach()
    return conversion.emit(
        OPS.channel_affine.default,
        (
            x.node,
            *x.grid.input,
            conversion.constant(f"{path}.channel_weight", weight.float()),
            conversion.constant(f"{path}.channel_bias", bias.float()),
            *grid.output(),
        ),
        grid,
    )


def _emit_pair(operator: Any) -> Emit:
    """Emits `operator` on two values."""

    def emit(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
        a, b = (conversion.integers[cast(fx.Node, operand)] for operand in node.args)
        low = grid.zero_point if node.target is add_relu else None
        return conversion.emit(
            operator, (a.node, *a.grid.input, b.node, *b.grid.input, *grid.output(low)), grid
        )

    return emit


def emit_table(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    """A function of one 8-bit value as 256 entries."""
    x = conversion.integers[node.all_input_nodes[0]]
    if x.grid.dtype != torch.uint8 or grid.dtype != torch.uint8:
        # 65,536 entries are no table: the function is computed in float inside the operation.
        floats = conversion.emit(OPS.dequantize.default, (x.node, *x.grid.input), None)
        conversion.floats[node.all_input_nodes[0]] = floats
        args = fx.map_arg(node.args, conversion.float_or_plain)
        result = conversion.graph.create_node("call_function", node.target, args, dict(node.kwargs))
        conversion.annotate(result, None)
        return conversion.emit(OPS.quantize.default, (result, *grid.output()), grid)
    table = build_table(
        table_function(node), *x.grid.input, grid.scale, grid.zero_point, grid.qmin, grid.qmax
    )
    constant = conversion.constant(f"tables.{node.name}", table)
    return conversion.emit(OPS.lookup.default, (x.node, constant), grid)


def _emit_mean(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    x = conversion.integers[cast(fx.Node, node.args[0])]
    args = (x.node, *x.grid.input, *mean_dims(node), *grid.output())
    return conversion.emit(OPS.mean.default, args, grid)


def mean_dims(node: fx.Node) -> tuple[list[int], bool]:
    """The dimensions of a mean, and whether they are kept."""
    dims: Any = node.kwargs["dim"]
    return list(dims) if isinstance(dims, (tuple, list)) else [dims], bool(
        node.kwargs.get("keepdim", False)
    )


def _emit_adaptive(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    x = conversion.integers[cast(fx.Node, node.args[0])]
    kwargs: Any = fx.map_arg(node.kwargs, conversion.movable)
    size = expand(kwargs["output_size"], dimensions_of(node))
    args = (x.node, *x.grid.input, size, *grid.output())
    return conversion.emit(OPS.adaptive_avg_pool.default, args, grid)


def _emit_average(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    x = conversion.integers[cast(fx.Node, node.args[0])]
    kwargs: Any = fx.map_arg(node.kwargs, conversion.movable)
    args = (
        *(x.node, *x.grid.input),
        *window(kwargs, dimensions_of(node)),
        bool(kwargs.get("ceil_mode", False)),
        bool(kwargs.get("count_include_pad", True)),
        kwargs.get("divisor_override"),
        *grid.output(),
    )
    return conversion.emit(OPS.avg_pool.default, args, grid)


def dimensions_of(node: fx.Node) -> int:
    """Of a pooling: 2 for ``avg_pool2d``."""
    target: Any = node.target
    return int(target.__name__[-2])


def window(kwargs: Mapping[str, Any], dimensions: int) -> tuple[list[Any], list[Any], list[Any]]:
    """The size, the stride and the padding of the windows of a pooling."""
    kernel = expand(kwargs["kernel_size"], dimensions)
    stride = kwargs.get("stride")
    strides = kernel if stride in (None, ()) else expand(stride, dimensions)
    return kernel, strides, expand(kwargs.get("padding", 0), dimensions)


def expand(value: Any, dimensions: int) -> list[Any]:
    """One value for each dimension."""
    if isinstance(value, (tuple, list)):
        return list(value) if len(value) == dimensions else list(value) * dimensions
    return [value] * dimensions


EMITTERS: dict[Any, Emit] = {
    Kind.LAYER: _emit_layer_on,
    Kind.AFFINE: _emit_affine,
    Kind.TABLE: emit_table,
    torch.add: _emit_pair(OPS.add.default),
    add_relu: _emit_pair(OPS.add.default),
    torch.mul: _emit_pair(OPS.mul.default),
    **dict.fromkeys((torch.matmul, scaled_matmul, weighted_mean), _emit_matmul_on),
    torch.mean: _emit_mean,
    **dict.fromkeys(AVERAGES, _emit_average),
    **dict.fromkeys(ADAPTIVE_AVERAGES, _emit_adaptive),
}
"""How an operation writes the integers of a grid: by its kind, or else by its function."""
