from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import InsideBlocks, trunk
from tests.passes.checking import float_graph
from tests.passes.models import annotated, image, make


def names(nodes: Any) -> list[str]:
    return [node.name for node in nodes]


def on_trunk(graph_module: fx.GraphModule) -> list[str]:
    found = trunk(graph_module.graph)
    return [node.name for node in graph_module.graph.nodes if node in found]


def residual(self: Any, x: Any) -> Any:
    y = torch.sin(x)
    return torch.cos(F.relu(torch.add(torch.tanh(torch.exp(y)), y)))


def test_a_chain_is_all_trunk() -> None:
    chain = float_graph(make(lambda self, x: torch.exp(torch.sin(x))))
    assert on_trunk(chain) == ["x", "sin", "exp", "output"]


def test_a_residual_branch_is_off_the_trunk() -> None:
    found = on_trunk(float_graph(make(residual)))
    assert found == ["x", "sin", "add", "relu", "cos", "output"]


def test_both_branches_are_off_the_trunk() -> None:
    branches = float_graph(make(lambda self, x: torch.add(torch.sin(x), torch.cos(x))))
    assert on_trunk(branches) == ["x", "add", "output"]


def test_with_two_inputs_the_trunk_begins_where_they_meet() -> None:
    two = float_graph(make(lambda self, x, y: torch.sin(torch.add(torch.exp(x), y))))
    assert on_trunk(two) == ["add", "sin", "output"]


def test_with_two_outputs_the_trunk_ends_where_they_part() -> None:
    two = float_graph(make(lambda self, x: (torch.sin(y := torch.exp(x)), y)))
    assert on_trunk(two) == ["x", "exp", "output"]


def test_what_leads_nowhere_does_not_count() -> None:
    graph_module = float_graph(make(lambda self, x: torch.exp(torch.sin(x))))
    (sin,) = graph_module.graph.find_nodes(op="call_function", target=torch.sin)
    with graph_module.graph.inserting_after(sin):
        graph_module.graph.call_function(torch.cos, (sin,))
    assert on_trunk(graph_module) == ["x", "sin", "exp", "output"]


def test_constants_are_no_branches() -> None:
    model = make(lambda self, x: torch.mul(torch.sin(x), self.factor), factor=torch.ones(1))
    assert on_trunk(float_graph(model)) == ["x", "sin", "mul", "output"]


def test_sizes_are_no_branches() -> None:
    def forward(self: Any, x: Any) -> Any:
        batch = x.size(0)
        return torch.reshape(torch.exp(torch.sin(x)), (batch, -1))

    found = on_trunk(annotated(make(forward), image()))
    assert found == ["x", "sin", "exp", "reshape", "output"]


def test_inside_blocks_holds_the_join_and_its_relu() -> None:
    graph = float_graph(make(residual)).graph
    inside = InsideBlocks()
    assert names(node for node in graph.nodes if inside(node)) == ["exp", "tanh", "add", "relu"]


def test_an_addition_outside_of_branches_is_outside() -> None:
    graph = float_graph(make(lambda self, x: F.relu(torch.add(torch.sin(x), 1.0)))).graph
    assert not any(map(InsideBlocks(), graph.nodes))


def test_inside_blocks_sees_nodes_that_came_later() -> None:
    graph_module = float_graph(make(residual))
    inside = InsideBlocks()
    (cos,) = graph_module.graph.find_nodes(op="call_function", target=torch.cos)
    assert not inside(cos)
    with graph_module.graph.inserting_after(cos):
        new = graph_module.graph.call_function(torch.sin, (cos,))
    cos.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    assert not inside(new)


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_removing_each_node(seed: int) -> None:
    """A node is on the trunk if and only if no path is left without it."""
    draw = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{index}") for index in range(draw.randint(1, 2))]
    for _ in range(draw.randint(2, 10)):
        operands = draw.choices(nodes[-3:], k=2)
        nodes.append(graph.call_function(torch.add, tuple(operands)))
    output = graph.output(tuple(draw.sample(nodes[-3:], k=draw.randint(1, 2))))
    graph_module = fx.GraphModule(nn.Module(), graph)
    live = {node for node in nodes if _reaches(node, output, None)}
    expected = {
        removed
        for removed in live
        if not any(
            node.op == "placeholder" and node in live and _reaches(node, output, removed)
            for node in nodes
        )
    }
    assert trunk(graph_module.graph) - {graph_module.graph.output_node()} == expected


def _reaches(node: fx.Node, goal: fx.Node, removed: fx.Node | None) -> bool:
    reached = set() if node is removed else {node}
    for each in node.graph.nodes:
        if each is not removed and not reached.isdisjoint(each.all_input_nodes):
            reached.add(each)
    return goal in reached


def test_sweeps_a_large_graph_quickly() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in itertools.repeat(None, 2000):
        node = graph.call_function(torch.add, (graph.call_function(torch.sin, (node,)), node))
    graph.output(node)
    assert sum(map(InsideBlocks(), graph.nodes)) == 4000
