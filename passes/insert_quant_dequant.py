"""Quantizer modules on the values and weights that a plan names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from passes.fold_batch_norm import FoldBatchNorm
from passes.fuse_conv_bn_relu import FuseConvBnRelu
from passes.infer_ranges import InferRanges
from passes.infra.base import Decline, Pass, PassResult
from passes.infra.meta import copy_meta
from passes.infra.rewrite import Rewriter
from passes.layers.fused_layer import FusedLayer

__all__ = ["InsertQuantDequant", "QuantizerSite"]


@dataclass(frozen=True)
class QuantizerSite:
    """One quantizer module, where it is put, and the nodes whose values pass through it."""

    path: str
    module: nn.Module
    nodes: Sequence[str]


class InsertQuantDequant(Pass):
    """Put quantizers behind values and on weights.

        before                  after
        y = conv2d(x)           y  = conv2d(x; W through its quantizer)
        z = relu(y)             yq = quantizers.y(y)
                                z  = relu(yq)

    `values` says which nodes' values pass through which quantizer; several nodes may share one.
    `weights` gives the weight quantizer of a layer's node. `reads_quantized(value, user)` says
    which users read the quantized value (default: all). Exact as long as the quantizers let
    their input pass, as fresh ones do until they are calibrated.

    Declines where a node is gone.
    """

    exact = True
    after = (FoldBatchNorm, FuseConvBnRelu, InferRanges)

    def __init__(
        self,
        values: Sequence[QuantizerSite],
        weights: Mapping[str, nn.Module],
        reads_quantized: Callable[[fx.Node, fx.Node], bool] = lambda value, user: True,
    ) -> None:
        self.values = tuple(values)
        self.weights = dict(weights)
        self.reads_quantized = reads_quantized

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Insert what is not there yet."""
        rewriter = Rewriter(graph_module)
        nodes = {node.name: node for node in graph_module.graph.nodes}
        declines: list[Decline] = []
        for name, quantizer in self.weights.items():
            node = nodes.get(name)
            if node is None:
                declines.append(Decline(name, "is not in the graph"))
            elif not self._has_weight_quantizer(graph_module, node, quantizer):
                self._quantize_weight(rewriter, node, quantizer)
        for site in self.values:
            for name in site.nodes:
                node = nodes.get(name)
                if node is None:
                    declines.append(Decline(name, "is not in the graph"))
                elif not any(user.target == site.path for user in node.users):
                    self._quantize_value(rewriter, node, site)
        return PassResult(rewriter.finish(), tuple(declines))

    @staticmethod
    def _has_weight_quantizer(root: nn.Module, node: fx.Node, quantizer: nn.Module) -> bool:
        module = root.get_submodule(str(node.target))
        return isinstance(module, FusedLayer) and module.weight_quantizer is quantizer

    @staticmethod
    def _quantize_weight(rewriter: Rewriter, node: fx.Node, quantizer: nn.Module) -> None:
        path = str(node.target)
        module = rewriter.graph_module.get_submodule(path)
        fused = module if isinstance(module, FusedLayer) else FusedLayer(module)
        rewriter.set_module(path, fused.with_parts(weight_quantizer=quantizer))

    def _quantize_value(self, rewriter: Rewriter, node: fx.Node, site: QuantizerSite) -> None:
        first = node.name == site.nodes[0]
        with rewriter.after(node):
            quantized = rewriter.call_module(
                site.path, site.module if first else None, (node,), like=node, name=f"{node.name}_q"
            )
        copy_meta(node, quantized, "range")
        rewriter.redirect(node, quantized, lambda user: self.reads_quantized(node, user))
