"""Activations and residual additions move into the layers that feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from passes.canonicalize import Canonicalize
from passes.fold_batch_norm import FoldBatchNorm
from passes.infra.base import Decline, Pass, PassResult, tensor_info
from passes.infra.rewrite import Rewriter
from passes.infra.stored import call_sites
from passes.layers.fused_layer import FusedLayer, add_relu
from passes.layers.questions import find_layer, only_user, why_not_layer

__all__ = ["FuseConvBnRelu", "fusible_activation"]

_ACTIVATIONS = {F.relu: "relu", F.relu6: "relu6"}


class FuseConvBnRelu(Pass):
    """Fuse ReLU and ReLU6 into convolutions and linear layers, and residual additions too.

        before                        after
        y = conv(x)                   z = conv_relu(x)
        z = relu(y)

        y = conv(x)                   z = conv_add_relu(x, r)
        s = y + r
        z = relu(s)

        s = a + b                     z = add_relu(a, b)
        z = relu(s)

    Run after FoldBatchNorm, this is Conv-BN-ReLU; a batch norm that was not folded stays as it
    is. A layer that takes something in becomes a FusedLayer at its own path, any other stays a
    plain module. Of two layers that an addition joins, the one that runs later takes the other
    as its residual, with or without a ReLU behind. Where no layer can, addition and ReLU become
    one `add_relu`. `residual=False` leaves additions out of layers.

    Declines when the layer feeds several nodes, is called at several places or is not plain;
    for a residual also when the operands differ in shape or dtype, the other one is a constant,
    or `alpha` is not 1. `where` picks the layers and additions that may take something in; it
    is asked about all of them before the first change.
    """

    exact = True
    after = (Canonicalize, FoldBatchNorm)

    def __init__(
        self, where: Callable[[fx.Node], bool] = lambda node: True, *, residual: bool = True
    ) -> None:
        self.where = where
        self.residual = residual

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Visit every node once; a layer that takes a residual in takes its ReLU too."""
        rewriter = Rewriter(graph_module)
        sites = call_sites(graph_module.graph)
        position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        allowed = {
            node
            for node in position
            if (find_layer(node) or _is_addition(node)) and self.where(node)
        }
        declines: list[Decline] = []
        for node in position:
            if _is_addition(node):
                layers = sorted(_joined_layers(node), key=lambda layer: -position[layer])
                reason = _take_residual(rewriter, node, layers, allowed, sites, self.residual)
                if reason is None:
                    continue
                if layers and self.residual:
                    declines.append(Decline.at(node, reason))
                reason = _take_relu(rewriter, node, allowed)
            elif find_layer(node):
                reason = _take_activation(rewriter, node, allowed, sites)
            else:
                continue
            if reason:
                declines.append(Decline.at(node, reason))
        return PassResult(rewriter.finish(), tuple(declines))


def fusible_activation(node: Any) -> str | None:
    """``"relu"`` or ``"relu6"`` where `node` computes just that; else None."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    function: Any = node.target
    return _ACTIVATIONS.get(function)


def _is_addition(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target is torch.add
        and len(node.args) == 2
        and all(isinstance(argument, fx.Node) for argument in node.args)
    )


def _joined_layers(addition: fx.Node) -> list[fx.Node]:
    return [node for node in addition.all_input_nodes if find_layer(node)]


def _take_residual(
    rewriter: Rewriter,
    addition: fx.Node,
    layers: list[fx.Node],
    allowed: set[fx.Node],
    sites: dict[str, int],
    residual: bool,
) -> str | None:
    """Fuse an addition into the last of the `layers` that can take it; the reason where none."""
    if not residual or not layers:
        return "joins no layer that may take a residual"
    reason = _why_no_residual(addition, allowed)
    if reason is not None:
        return reason
    refused = {layer: _why_not_layer(layer, allowed, sites) for layer in layers}
    taker = next((layer for layer in layers if refused[layer] is None), None)
    if taker is None:
        return refused[layers[0]]
    # Nothing but the addition reads the layer, so the other operand cannot depend on it, and the
    # layer may run as late as the addition does.
    first, second = addition.args
    rewriter.move_before(taker, addition)
    rewriter.set_call(taker, (taker.args[0], second if first is taker else first))
    rewriter.absorb(addition, taker)
    activation = only_user(taker)
    kind = fusible_activation(activation)
    if activation is not None and kind is not None:
        rewriter.absorb(activation, taker)
    _fuse(rewriter, taker, kind or "none", has_residual=True)
    return None


def _why_no_residual(addition: fx.Node, allowed: set[fx.Node]) -> str | None:
    if addition not in allowed:
        return "was not selected"
    first, second = addition.args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    if first is second:
        return f"adds {first.name} to itself"
    if addition.kwargs.get("alpha", 1) != 1:
        return f"alpha is {addition.kwargs['alpha']}"
    for operand in (first, second):
        if operand.op == "get_attr":
            return f"{operand.name} is a constant"
        if tensor_info(operand) is None:
            return f"the shape of {operand.name} is not known"
    if tensor_info(first) != tensor_info(second):
        return f"{first.name} and {second.name} differ in shape or dtype"
    return None


def _why_not_layer(node: fx.Node, allowed: set[fx.Node], sites: dict[str, int]) -> str | None:
    if len(node.users) > 1:
        return f"{node.name} feeds {len(node.users)} nodes"
    return why_not_layer(node, allowed, sites)


def _take_activation(
    rewriter: Rewriter, node: fx.Node, allowed: set[fx.Node], sites: dict[str, int]
) -> str | None:
    """Fuse the activation behind a layer; the reason where there is one that cannot be."""
    activation = next((user for user in node.users if fusible_activation(user)), None)
    kind = fusible_activation(activation)
    if activation is None or kind is None:
        return None
    reason = _why_not_layer(node, allowed, sites)
    if reason is None:
        rewriter.absorb(activation, node)
        _fuse(rewriter, node, kind, has_residual=False)
    return reason


def _take_relu(rewriter: Rewriter, addition: fx.Node, allowed: set[fx.Node]) -> str | None:
    """Make addition and ReLU one call; the reason where there is a ReLU and that cannot be."""
    relu = next((user for user in addition.users if fusible_activation(user) == "relu"), None)
    if relu is None:
        return None
    if addition not in allowed:
        return "was not selected"
    if len(addition.users) > 1:
        return f"feeds {len(addition.users)} nodes"
    if addition.kwargs.get("alpha", 1) != 1:
        return f"alpha is {addition.kwargs['alpha']}"
    rewriter.absorb(relu, addition)
    rewriter.replace_call(addition, add_relu, addition.args)
    return None


def _fuse(rewriter: Rewriter, node: fx.Node, activation: str, *, has_residual: bool) -> None:
    layer = find_layer(node)
    assert layer is not None
    fused = FusedLayer(layer, activation)
    fused.has_residual = has_residual
    fused.training = layer.training
    rewriter.set_module(str(node.target), fused)
