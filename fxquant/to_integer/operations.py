"""Everything but layers on integers: one emitter for each kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.integer import build_table
from fxquant.plan.operations import Kind, table_function
from fxquant.to_integer.conversion import OPS, Conversion, Integers
from fxquant.to_integer.grid import Grid
from fxquant.to_integer.layers import emit_layer, output_bounds
from passes import add_relu, weighted_mean

__all__ = ["EMITTERS", "Emit", "emit_matmul", "emit_movement", "emit_table"]


def emit_movement(conversion: Conversion, node: fx.Node) -> None:
    """Emit a movement or selection of integers: the same call on the integers themselves."""
    operand = next(source for source in node.all_input_nodes if source in conversion.integers)
    grid = conversion.integers[operand].grid
    args = fx.map_arg(node.args, conversion.movable)
    kwargs = dict(fx.map_arg(node.kwargs, conversion.movable))
    if node.target is F.pad:
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
    target: Any = node.target
    dimensions = int(target.__name__[-2])
    kernel = _expand(kwargs["kernel_size"], dimensions)
    stride = kwargs.get("stride")
    args = (
        x,
        kernel,
        kernel if stride in (None, ()) else _expand(stride, dimensions),
        _expand(kwargs.get("padding", 0), dimensions),
        _expand(kwargs.get("dilation", 1), dimensions),
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


def _emit_pair(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    a, b = (conversion.integers[cast(fx.Node, operand)] for operand in node.args)
    target = OPS.mul.default if node.target is torch.mul else OPS.add.default
    low = grid.zero_point if node.target is add_relu else None
    return conversion.emit(
        target, (a.node, *a.grid.input, b.node, *b.grid.input, *grid.output(low)), grid
    )


def emit_table(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    """A function of one 8-bit value as 256 entries."""
    x = conversion.integers[node.all_input_nodes[0]]
    function = table_function(node)
    if x.grid.dtype != torch.uint8 or grid.dtype != torch.uint8:
        # 65,536 entries are no table: the function is computed in float inside the operation.
        floats = conversion.emit(OPS.dequantize.default, (x.node, *x.grid.input), None)
        conversion.floats[node.all_input_nodes[0]] = floats
        args = fx.map_arg(node.args, conversion.float_or_plain)
        result = conversion.graph.create_node("call_function", node.target, args, dict(node.kwargs))
        conversion.annotate(result, None)
        return conversion.emit(OPS.quantize.default, (result, *grid.output()), grid)
    table = build_table(function, *x.grid.input, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    constant = conversion.constant(f"tables.{node.name}", table)
    return conversion.emit(OPS.lookup.default, (x.node, constant), grid)


def _emit_pool(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    x = conversion.integers[cast(fx.Node, node.args[0])]
    kwargs = dict(fx.map_arg(node.kwargs, conversion.movable))
    head = (x.node, *x.grid.input)
    target: Any = node.target
    if target is torch.mean:
        dims = kwargs["dim"]
        dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
        keepdim = bool(kwargs.get("keepdim", False))
        return conversion.emit(OPS.mean.default, (*head, dims, keepdim, *grid.output()), grid)
    dimensions = int(target.__name__[-2])
    if target.__name__.startswith("adaptive"):
        size = _expand(kwargs["output_size"], dimensions)
        return conversion.emit(OPS.adaptive_avg_pool.default, (*head, size, *grid.output()), grid)
    kernel = _expand(kwargs["kernel_size"], dimensions)
    stride = kwargs.get("stride")
    args = (
        *head,
        kernel,
        kernel if stride in (None, ()) else _expand(stride, dimensions),
        _expand(kwargs.get("padding", 0), dimensions),
        bool(kwargs.get("ceil_mode", False)),
        bool(kwargs.get("count_include_pad", True)),
        kwargs.get("divisor_override"),
        *grid.output(),
    )
    return conversion.emit(OPS.avg_pool.default, args, grid)


def _expand(value: Any, dimensions: int) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return list(value) if len(value) == dimensions else list(value) * dimensions
    return [value] * dimensions


Emit = Callable[[Conversion, fx.Node, Grid], fx.Node]
"""Emits the operation of a simulated node on integers that lie on a grid."""

EMITTERS: dict[Kind, Emit] = {
    Kind.LAYER: _emit_layer_on,
    Kind.AFFINE: _emit_affine,
    Kind.PAIR: _emit_pair,
    Kind.MATMUL: _emit_matmul_on,
    Kind.TABLE: emit_table,
    Kind.POOL: _emit_pool,
}
"""How each kind writes the integers of a grid."""
