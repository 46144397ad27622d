"""Where a graph branches: its trunk, and the branching regions between trunk nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import fx

from passes.infra.fused_layer import add_relu

__all__ = ["InsideBlocks", "Region", "branching_regions", "trunk"]

_JOINS = (torch.add, add_relu)
_ACTIVATIONS = (F.relu, F.relu6)


@dataclass(frozen=True)
class Region:
    """What lies between two neighbouring nodes of the trunk.

    `inside` holds, in execution order, every node on a path from `entry` to `exit` that
    branches off the trunk: one residual block, one inception block, one squeeze-and-excitation.
    Nothing inside reads a value from before `entry`, and nothing behind `exit` reads one from
    inside: the region has a single input and a single output.
    """

    entry: fx.Node
    inside: tuple[fx.Node, ...]
    exit: fx.Node


def trunk(graph: fx.Graph) -> set[fx.Node]:
    """The nodes through which every path from the inputs to the output leads.

    Paths follow tensors only: a batch size that is read at the front and used at the back does
    not make a branch of all that lies between, and neither does a constant. Which values are
    tensors is read from ``node.meta["tensor"]``; in a graph without it every value counts.
    Nodes that do not lead to the output are never on the trunk. The output node always is.

    One sweep in execution order: a node is on the trunk exactly when no value that was made
    before it is still read after it.
    """
    return set(_trunk(_data_flow(graph)))


def branching_regions(graph: fx.Graph) -> list[Region]:
    """The regions between neighbouring trunk nodes that hold anything, in execution order.

    A graph whose inputs meet only later has no trunk before that point, and hence no region.
    """
    flow = _data_flow(graph)
    position = {node: index for index, node in enumerate(flow)}
    nodes = list(flow)
    stations = list(_trunk(flow))
    found = []
    for entry, exit_ in pairwise(stations):
        inside = tuple(nodes[position[entry] + 1 : position[exit_]])
        if inside:
            found.append(Region(entry, inside, exit_))
    return found


class InsideBlocks:
    """The predicate "inside a branching region", for the `where` of a pass.

    Inside are the nodes off the trunk; the addition that joins a region's branches, although
    every path leads through it; and the ReLU that alone reads such an addition. Stem, head and
    the layers of a chain are outside. The graph is swept when the first node of it is asked
    about, and again when a node turns up that was not there then.
    """

    def __init__(self) -> None:
        self._outside: set[fx.Node] = set()
        self._known: set[fx.Node] = set()

    def __call__(self, node: fx.Node) -> bool:
        """Whether `node` lies inside a branching region of its graph."""
        if node not in self._known:
            self._known = set(node.graph.nodes)
            self._outside = _outside(node.graph)
        return node not in self._outside


def _outside(graph: fx.Graph) -> set[fx.Node]:
    on_trunk = trunk(graph)
    inside: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node not in on_trunk:
            continue
        operands = node.all_input_nodes
        joins = node.target in _JOINS and any(operand not in on_trunk for operand in operands)
        follows = node.target in _ACTIVATIONS and any(
            operand in inside and len(operand.users) == 1 for operand in operands
        )
        if joins or follows:
            inside.add(node)
    return on_trunk - inside


def _data_flow(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes on tensor paths from an input to the output, each with those that read it."""
    annotated = any("tensor" in node.meta for node in graph.nodes)

    def carries(node: fx.Node) -> bool:
        return node.op == "output" or not annotated or "tensor" in node.meta

    reached: set[fx.Node] = set()
    for node in graph.nodes:
        fed = any(source in reached for source in node.all_input_nodes)
        if carries(node) and (node.op == "placeholder" or fed):
            reached.add(node)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        if node in reached:
            users = [user for user in node.users if user in readers]
            if users or node.op == "output":
                readers[node] = users
    return dict(reversed(readers.items()))


def _trunk(flow: dict[fx.Node, list[fx.Node]]) -> Iterator[fx.Node]:
    position = {node: index for index, node in enumerate(flow)}
    # All inputs are there from the start: until the last of them has been passed, a path that
    # begins at a later one avoids the node.
    last_read = max((position[node] for node in flow if node.op == "placeholder"), default=-1)
    for node, users in flow.items():
        if last_read <= position[node]:
            yield node
        last_read = max([last_read, *(position[user] for user in users)])
