"""Which parts of a graph have one entry and one exit, and which of them make a good block."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.infra.fused_layer import FusedLayer, add_relu

__all__ = ["Flow", "SingleExit", "data_flow", "is_layer", "is_quantizer", "residual_blocks"]

_MOST_LAYERS = 12  # a region with more is left in its parts, where it has any


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


@dataclass(frozen=True)
class SingleExit:
    """The nodes behind an entry that all lead to `exit`, and nowhere else; `exit` included."""

    members: frozenset[fx.Node]
    exit: fx.Node
    residual: bool


def is_quantizer(node: fx.Node) -> bool:
    """Whether `node` calls a module that maps a value to its quantized image."""
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return False
    module = _module(node)
    return getattr(module, "operation", "") == "quantize" or hasattr(type(module), "has_qparams")


def is_layer(node: fx.Node) -> bool:
    """Whether `node` calls a module with a weight matrix: no norm, no activation."""
    if node.op != "call_module" or is_quantizer(node):
        return False
    module = _module(node)
    if isinstance(module, FusedLayer):
        return True
    if isinstance(module, nn.LayerNorm):
        return False
    return any(parameter.dim() >= 2 for parameter in module.parameters())


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


def residual_blocks(flow: Flow, allowed: Collection[fx.Node]) -> list[SingleExit]:
    """The regions of `allowed` nodes that are worth a block, none inside another.

    A region ends where branches meet and begins behind the last node that all paths to there
    have passed. Where regions lie inside each other, that around a residual addition takes in
    what lies inside of it (squeeze-and-excitation, the products of attention), unless that is
    two residual additions in a row: then it is a skip around blocks, and these are the blocks.
    Other joins (concatenation, gating) make a block where no residual addition is inside.
    """
    owner: dict[fx.Node, SingleExit] = {}
    for region in sorted(_regions(flow, allowed), key=lambda region: len(region.members)):
        layers = sum(map(is_layer, region.members))
        inside = {id(r): r for r in (owner.get(node) for node in region.members) if r}.values()
        residuals = sum(r.residual for r in inside)
        fits = layers <= _MOST_LAYERS or not inside
        if layers and fits and residuals <= (1 if region.residual else 0):
            owner.update(dict.fromkeys(region.members, region))
    return list({id(region): region for region in owner.values()}.values())


def _regions(flow: Flow, allowed: Collection[fx.Node]) -> Iterable[SingleExit]:
    dominator = _immediate_dominators(flow)
    for join, sources in flow.reads.items():
        if len(sources) < 2 or join.op == "output" or join not in allowed:
            continue
        entry = dominator[join]
        if entry is None:
            continue
        members, pending = {join}, list(sources)
        while pending:
            node = pending.pop()
            if node is not entry and node not in members:
                members.add(node)
                pending.extend(flow.reads[node])
        closed = all(set(flow.readers[node]) <= members for node in members if node is not join)
        if closed and all(node in allowed for node in members):
            yield SingleExit(frozenset(members), join, _is_residual(join))


def _immediate_dominators(flow: Flow) -> dict[fx.Node, fx.Node | None]:
    """The last node that every path from the inputs to a node passes; None: there is none."""
    dominator: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node | None, int] = {None: 0}
    for node, sources in flow.reads.items():
        common: fx.Node | None = sources[0] if sources else None
        for source in sources[1:]:
            other: fx.Node | None = source
            while common is not other:
                if depth[common] >= depth[other]:
                    assert common is not None
                    common = dominator[common]
                else:
                    assert other is not None
                    other = dominator[other]
        dominator[node] = common
        depth[node] = depth[common] + 1
    return dominator


def _is_residual(node: fx.Node) -> bool:
    return node.target in (torch.add, add_relu) or (
        node.op == "call_module" and isinstance(_module(node), FusedLayer)
    )


def _module(node: fx.Node) -> nn.Module:
    root = node.graph.owning_module
    assert root is not None
    return root.get_submodule(str(node.target))
