"""What is reached from a node of a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.infra.walk import reached
from tests.passes.checking import Function, float_graph


def forward(self: Function, x: Tensor) -> Tensor:
    y = torch.relu(x)
    return torch.add(torch.neg(y), torch.mul(y, y))


def test_every_node_behind_the_starts_is_reached_once() -> None:
    nodes = {node.name: node for node in float_graph(Function(forward)).graph.nodes}
    back = reached([nodes["add"]], lambda node: node.all_input_nodes)
    assert back[0] is nodes["add"]
    assert sorted(node.name for node in back) == ["add", "mul", "neg", "relu", "x"]


def test_the_way_ends_where_nothing_leads_further() -> None:
    nodes = {node.name: node for node in float_graph(Function(forward)).graph.nodes}
    ahead = reached([nodes["neg"]], lambda node: () if node.name == "add" else node.users)
    assert [node.name for node in ahead] == ["neg", "add"]
