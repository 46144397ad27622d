"""What stays float: operations, modules as functions, layers whose weights alone are integers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.simulate.quantizers import WeightQuantizer
from fxquant.to_integer.conversion import OPS, Conversion
from fxquant.to_integer.functional import functional
from fxquant.to_integer.layers import activate, weight_constants
from passes import FusedLayer

__all__ = ["float_operation"]


def float_operation(conversion: Conversion, node: fx.Node) -> None:
    """Emit a node that stays float, or one that only reads shapes."""
    if node.meta.get("tensor") is None and node.op != "call_module":
        args = fx.map_arg(node.args, conversion.movable)
        kwargs = fx.map_arg(node.kwargs, conversion.movable)
        copied = conversion.graph.create_node(
            node.op, node.target, args, dict(kwargs), name=node.name
        )
        conversion.plain[node] = conversion.annotate(copied, None)
        return
    args = fx.map_arg(node.args, conversion.float_or_plain)
    kwargs = dict(fx.map_arg(node.kwargs, conversion.float_or_plain))
    if node.op != "call_module":
        emitted = conversion.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        conversion.floats[node] = conversion.annotate(emitted, None)
        return
    path = str(node.target)
    module = conversion.source.get_submodule(path)
    if isinstance(module, FusedLayer):
        conversion.floats[node] = _float_layer(conversion, path, module, *args)
        return
    # The function takes what is missing in a size, which the input decides.
    as_function = None if "output_size" in kwargs else functional(module)
    if as_function is None:
        conversion.copy_module(path, module)
        emitted = conversion.graph.create_node("call_module", path, args, kwargs, name=node.name)
        conversion.floats[node] = conversion.annotate(emitted, None)
        return

    def constant(name: str) -> fx.Node:
        return conversion.constant(f"{path}.{name}", operator.attrgetter(name)(module))

    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        created = conversion.graph.create_node("call_function", target, args, kwargs)
        return conversion.annotate(created, None)

    conversion.floats[node] = as_function(module, constant, call, args, kwargs)


def _float_layer(
    conversion: Conversion, path: str, module: FusedLayer, x: Any, *residual: Any
) -> fx.Node:
    """A layer that computes in float, its weight dequantized from integers if it has a grid."""
    layer: Any = module.layer
    quantizer = module.weight_quantizer
    if isinstance(quantizer, WeightQuantizer):
        weight, zero_point = weight_constants(conversion, path, layer, quantizer, quantizer.qparams)
        scale = conversion.constant(f"{path}.weight_scale", quantizer.qparams.scale)
        axis = quantizer.qparams.axis or 0
        dequantized = conversion.emit(
            OPS.dequantize_weight.default,
            (weight, scale, zero_point, axis),
            None,
            f"{conversion.current.name}_weight_float",
        )
    else:
        dequantized = conversion.constant(f"{path}.weight", layer.weight)
    bias = None if layer.bias is None else conversion.constant(f"{path}.float_bias", layer.bias)
    as_function = functional(layer)
    assert as_function is not None

    def constant(name: str) -> fx.Node | None:
        return dequantized if name == "weight" else bias

    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        created = conversion.graph.create_node("call_function", target, args, kwargs)
        return conversion.annotate(created, None)

    y = as_function(layer, constant, call, (x,), {})
    if residual:
        y = call(torch.add, (y, residual[0]), {})
    return activate(conversion, y, module.activation)
