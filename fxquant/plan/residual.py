"""The residual stream of a transformer: the additions whose sums grow from block to block.

Its values outgrow 8 bits: a few channels are a hundred times larger than the others, and a layer
norm behind them divides by what is left (Li and Gu, I-ViT, ICCV 2023, keep 16 bits there).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxquant.plan.operations import Kind, classify, data_operands, layer_of
from passes.infra.walk import reached

__all__ = ["ResidualStream"]


class ResidualStream:
    """The additions of a graph's residual streams, and the values that they add.

    An addition of two activations belongs to one where a linear layer makes an operand, through
    movement, scaling by a constant or a layer norm; so do the additions next to it, such as that
    of a position embedding. Where convolutions alone are joined there is none.

    `additions`: the nodes. `values`: they and what they read: the operands that something else
    than movement made, constants too.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._root: nn.Module = graph_module
        kinds = {node: classify(node, graph_module).kind for node in graph_module.graph.nodes}
        self._moves = {node for node, kind in kinds.items() if kind in (Kind.MOVE, Kind.SELECT)}
        candidates = [
            node
            for node, kind in kinds.items()
            if kind is Kind.PAIR and node.target is torch.add and len(data_operands(node)) == 2
        ]
        self.additions = self._connected(candidates)
        self.values = set(self.additions)
        for node in self.additions:
            for operand in node.all_input_nodes:
                self.values.update(self._made(operand))

    def _connected(self, candidates: list[fx.Node]) -> set[fx.Node]:
        found = {node for node in candidates if self._joins_linear(node)}
        while True:
            # A pooled or strided shortcut moves between two additions like a reshape does.
            nearby = {
                other
                for node in candidates
                for operand in node.all_input_nodes
                for other in self._made(operand)
                if other in candidates and (node in found or other in found)
                for other in (other, node)
            }
            if nearby <= found:
                return found
            found |= nearby

    def _joins_linear(self, node: fx.Node) -> bool:
        operands = node.all_input_nodes
        activations = all(operand.op != "get_attr" for operand in operands)
        return activations and any(self._is_linear(operand) for operand in operands)

    def _is_linear(self, node: fx.Node) -> bool:
        return any(
            isinstance(layer_of(source, self._root), nn.Linear)
            or (self._only_scales(source) and any(map(self._is_linear, source.all_input_nodes)))
            for source in self._made(node)
        )

    def _only_scales(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._root.get_submodule(str(node.target)), nn.LayerNorm)
        constant: Any = any(source.op == "get_attr" for source in node.all_input_nodes)
        return node.target is torch.mul and bool(constant)

    def _made(self, node: fx.Node) -> list[fx.Node]:
        """Where the values of `node` come from, behind all movement."""
        behind = reached([node], lambda node: data_operands(node) if node in self._moves else ())
        return [source for source in behind if source not in self._moves]
