"""Softmax, GELU, layer norms and their like by the modules that stand for their integer forms."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from passes.fuse_conv_bn_relu import FuseConvBnRelu
from passes.infer_ranges import InferRanges
from passes.infra.base import Decline, Pass, PassResult
from passes.infra.rewrite import Rewriter

__all__ = ["ReplaceIntegerOps"]


class ReplaceIntegerOps(Pass):
    """Put the modules handed in where operations are that have an integer form.

        before                          after
        p = softmax(s, dim=-1)          p = integer_ops.p(s)
        y = norm(x)    (nn.LayerNorm)   y = norm(x)    (the module handed in, at the same path)

    `modules` maps node names to modules that take the operation's tensors and know its other
    parameters. Exact as long as the modules compute in float, as fresh ones do until they are
    told the grid of what they read.

    Declines where a node is gone.
    """

    exact = True
    after = (FuseConvBnRelu, InferRanges)

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace what is not replaced yet."""
        rewriter = Rewriter(graph_module)
        nodes = {node.name: node for node in graph_module.graph.nodes}
        declines = []
        for name, module in self.modules.items():
            node = nodes.get(name)
            if node is None:
                declines.append(Decline(name, "is not in the graph"))
            elif node.op == "call_module":
                if graph_module.get_submodule(str(node.target)) is not module:
                    rewriter.set_module(str(node.target), module)
            else:
                self._replace(rewriter, node, module)
        return PassResult(rewriter.finish(), tuple(declines))

    @staticmethod
    def _replace(rewriter: Rewriter, node: fx.Node, module: nn.Module) -> None:
        rewriter.replace_with_module(
            node, f"integer_ops.{node.name}", module, tuple(node.all_input_nodes)
        )
