"""Where a graph branches: its trunk, and what lies off it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from passes.blocks.flow import data_flow
from passes.layers.fused_layer import add_relu

__all__ = ["InsideBlocks", "trunk"]

_JOINS = (torch.add, add_relu)
_ACTIVATIONS = (F.relu, F.relu6)


def trunk(graph: fx.Graph) -> set[fx.Node]:
    """The nodes through which every path from the inputs to the output leads.

    Paths follow tensors only: a batch size that is read at the front and used at the back does
    not make a branch of all that lies between, and neither does a constant. Which values are
    tensors is read from ``node.meta["tensor"]``; in a graph without it every value counts.
    Nodes that do not lead to the output are never on the trunk. The output node always is.

    A node is on the trunk exactly when no value that was made before it is still read after it.
    """
    readers = data_flow(graph).readers
    position = {node: index for index, node in enumerate(readers)}
    # All inputs are there from the start: until the last of them has been passed, a path that
    # begins at a later one avoids the node.
    last_read = max((position[node] for node in readers if node.op == "placeholder"), default=-1)
    found = set()
    for node, users in readers.items():
        if last_read <= position[node]:
            found.add(node)
        last_read = max([last_read, *(position[user] for user in users)])
    return found


class InsideBlocks:
    """The predicate "off the trunk", for the `where` of a pass.

    Inside are the nodes off the trunk; the addition that joins branches, although every path
    leads through it; and the ReLU that alone reads such an addition. Stem, head and the layers
    of a chain are outside. The trunk is found when the first node of a graph is asked about, and
    again when a node turns up that was not there then.
    """

    def __init__(self) -> None:
        self._outside: set[fx.Node] = set()
        self._known: set[fx.Node] = set()

    def __call__(self, node: fx.Node) -> bool:
        """Whether `node` lies inside a block of its graph."""
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
