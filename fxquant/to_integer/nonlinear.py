"""Integer forms of softmax, GELU, layer norms: their operators, and the step to the next grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxquant.plan.nonlinear import Builder
from fxquant.simulate.nonlinear import SimulatedForm
from fxquant.to_integer.conversion import Conversion
from fxquant.to_integer.dyadic import rescale
from fxquant.to_integer.grid import Grid
from passes import tensor_info

__all__ = ["emit_nonlinear"]


def emit_nonlinear(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    """The operators of the form that `node` calls, written on `grid`."""
    module = conversion.source.get_submodule(str(node.target))
    assert isinstance(module, SimulatedForm)
    form = module.form
    x = conversion.integers[node.all_input_nodes[0]]
    mask = conversion.float_or_plain(node.all_input_nodes[1]) if len(node.args) > 1 else None

    def call(operator: Any, *args: Any) -> fx.Node:
        return conversion.emit(operator, args, None, f"{node.name}_accumulators")

    def constant(name: str, value: Tensor) -> fx.Node:
        return conversion.constant(f"integer_ops.{node.name}.{name}", value)

    build = Builder(call, constant)
    if form.operation == "softmax" and form.method == "table" and grid.zero_point == 0:
        on_grid = form.softmax_on(
            Builder(lambda operator, *args: conversion.emit(operator, args, grid), constant),
            x.node,
            x.grid.scale,
            grid.scale,
            grid.qmin,
            grid.qmax,
            grid.dtype,
            mask,
        )
        assert isinstance(on_grid, fx.Node)
        return on_grid
    info = tensor_info(node.all_input_nodes[0])
    assert info is not None
    produced = module.produce(build, x.node, *x.grid.input, rows=info.shape[-1], mask=mask)
    dictated = form.output
    if dictated is not None and float(dictated.scale) == grid.scale and grid.zero_point == 0:
        value: fx.Node = produced.value
        value.meta["grid"] = grid
        return value
    return rescale(conversion, produced.value, produced.scale, grid, axis=-1)
