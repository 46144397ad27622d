"""The flow of tensors through a graph: what blocks, branches and the trunk are read from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx, nn

from passes.infra.stored import module_of
from passes.layers.fused_layer import FusedLayer

__all__ = ["Flow", "data_flow", "is_layer", "is_quantizer"]


@dataclass(frozen=True)
class Flow:
    """The tensors on paths from an input to the output; quantizers count as their value.

    Attributes:
        reads: each value, in execution order, with the values that it is made from; the output
            node stands at the end.
        readers: the same edges the other way.
        images: the quantizers behind a value.
    """

    reads: dict[fx.Node, tuple[fx.Node, ...]]
    readers: dict[fx.Node, tuple[fx.Node, ...]]
    images: dict[fx.Node, tuple[fx.Node, ...]]

    def outputs(self, members: Collection[fx.Node]) -> list[fx.Node]:
        """The members that are read from outside."""
        return [
            node
            for node in members
            if any(reader not in members for reader in self.readers.get(node, ()))
        ]


def data_flow(graph: fx.Graph) -> Flow:
    """The flow of tensors; without ``node.meta["tensor"]`` every value counts as one."""
    annotated = any("tensor" in node.meta for node in graph.nodes)
    value: dict[fx.Node, fx.Node] = {}
    reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
    images: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        sources = tuple(dict.fromkeys(value[s] for s in node.all_input_nodes if s in value))
        carries = node.op == "output" or not annotated or "tensor" in node.meta
        if not carries or (node.op != "placeholder" and not sources):
            continue
        if is_quantizer(node):
            (value[node],) = sources
            images.setdefault(value[node], []).append(node)
        else:
            value[node] = node
            reads[node] = sources
    live = {graph.output_node()}
    for node in reversed(reads):
        if node in live:
            live.update(reads[node])
    reads = {node: sources for node, sources in reads.items() if node in live}
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in reads}
    for node, sources in reads.items():
        for source in sources:
            readers[source].append(node)
    return Flow(
        reads,
        {node: tuple(users) for node, users in readers.items()},
        {node: tuple(behind) for node, behind in images.items()},
    )


def is_quantizer(node: fx.Node) -> bool:
    """Whether `node` calls a module whose `operation` is "quantize".

    Such a module maps a value to its quantized image.
    """
    module = module_of(node)
    return getattr(module, "operation", "") == "quantize" and len(node.all_input_nodes) == 1


def is_layer(node: fx.Node) -> bool:
    """Whether `node` calls a module with a weight matrix: no norm, no activation."""
    module = module_of(node)
    if module is None or is_quantizer(node) or isinstance(module, nn.LayerNorm):
        return False
    if isinstance(module, FusedLayer):
        return True
    return any(parameter.dim() >= 2 for parameter in module.parameters())
