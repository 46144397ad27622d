"""Which parts of a graph run natively, and which stay calls from Python in between."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from passes import tensor_info

__all__ = ["Segment", "is_shape", "segment_module", "shape_roots", "split"]


@dataclass(eq=False)
class Segment:
    """Nodes that run one after the other: natively, or as calls from Python."""

    native: bool
    nodes: list[fx.Node] = field(default_factory=list)


def split(graph: fx.Graph, is_native: Callable[[fx.Node], bool]) -> list[Segment]:
    """Segments in an order in which they can run; as few as the operations allow.

    Nodes that only compute with shapes, constants, inputs and the output are in none of them.
    """
    kinds: dict[fx.Node, bool] = {}
    levels: dict[fx.Node, int] = {}
    segments: dict[tuple[int, bool], Segment] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or is_shape(node):
            # A shape is known once what it is read from is.
            sources = [levels[n] for n in node.all_input_nodes if n in levels]
            levels[node] = max(sources, default=0)
            continue
        native = is_native(node)
        if node.target is operator.getitem and node.args[0] in kinds:
            native = kinds[node.args[0]]
        kinds[node] = native
        level = 0
        for source in node.all_input_nodes:
            changes = source in kinds and kinds[source] != native
            # A shape that comes from the other kind's tensors must wait for them.
            if is_shape(source):
                changes = any(kinds.get(root, native) != native for root in shape_roots(source))
            level = max(level, levels[source] + (1 if changes else 0))
        levels[node] = level
        segments.setdefault((level, native), Segment(native)).nodes.append(node)
    return [segments[key] for key in sorted(segments)]


def is_shape(node: fx.Node) -> bool:
    """Whether a node computes with numbers, of which shapes are the source."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    info = node.meta.get("tensor")
    return info is None and not _holds_tensors(node)


def _holds_tensors(node: fx.Node) -> bool:
    """Whether several tensors are the result: of ``chunk``, or of a recurrent layer."""
    return any(
        user.target is operator.getitem and tensor_info(user) is not None for user in node.users
    )


def shape_roots(node: fx.Node) -> set[fx.Node]:
    """The tensors that a node of numbers is computed from."""
    roots: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if is_shape(source):
                waiting.append(source)
            elif source.op != "get_attr":
                roots.add(source)
    return roots


def segment_module(
    source: fx.GraphModule, segment: Segment
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """A segment as a graph of its own, with the nodes that it reads and those that it gives.

    The output is a tuple. Shapes are computed inside, from tensors that come in.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    inside = set(segment.nodes)

    def copy(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if node.op == "get_attr" or is_shape(node):
            copies[node] = graph.node_copy(node, copy)
        elif node not in inside:
            raise KeyError(node)
        return copies[node]

    needed = dict.fromkeys(
        root
        for node in segment.nodes
        for operand in node.all_input_nodes
        for root in (shape_roots(operand) if is_shape(operand) else (operand,))
        if root.op != "get_attr" and root not in inside
    )
    for node in needed:
        inputs.append(node)
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in segment.nodes:
        copies[node] = graph.node_copy(node, copy)
    outputs = [
        node
        for node in segment.nodes
        if tensor_info(node) is not None and _is_read_outside(node, inside)
    ]
    graph.output(tuple(copies[node] for node in outputs))
    return _Unwritten(_attributes(source, graph), graph), inputs, outputs


class _Unwritten(fx.GraphModule):
    """Planned from its graph, or interpreted: nobody needs it as Python code, which takes time."""

    def recompile(self) -> Any:
        pass

    def forward(self, *inputs: Any) -> Any:
        return fx.Interpreter(self).run(*inputs)


def _is_read_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Also where only a shape of it is."""
    return any(user not in inside for user in node.users)


def _attributes(source: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = source
            for name in str(node.target).split("."):
                value = getattr(value, name)
            found[str(node.target)] = value
    return found
