"""Operations by the modules that stand for their integer forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import Canonicalize, InferRanges, Pipeline, ReplaceIntegerOps, is_non_negative
from tests.passes.checking import check


class Softmax(nn.Module):
    operation = "integer_softmax"

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, -1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.norm(x), -1)


def canonical() -> fx.GraphModule:
    graph = fx.symbolic_trace(Net().eval())
    Pipeline([Canonicalize(), InferRanges()]).run(graph, (torch.randn(2, 4),))
    return graph


def test_a_function_becomes_a_call_of_the_module_handed_in_and_keeps_its_name() -> None:
    graph = canonical()
    module = Softmax()
    check(
        ReplaceIntegerOps({"softmax": module}),
        graph,
        torch.randn(2, 4),
        expect="""
        x       = input                     f32[2,4]
        norm    = layernorm(x)              f32[2,4]
        softmax = integer_softmax(norm)     f32[2,4]
        return softmax""",
    )


def test_what_was_proved_of_the_range_stays() -> None:
    graph = canonical()
    ReplaceIntegerOps({"softmax": Softmax()}).run(graph)
    (node,) = (node for node in graph.graph.nodes if node.name == "softmax")
    assert node.op == "call_module"
    assert is_non_negative(node)


def test_a_module_is_replaced_at_its_path() -> None:
    graph = canonical()
    norm = nn.LayerNorm(4)
    result = ReplaceIntegerOps({"norm": norm}).run(graph)
    assert result.modified
    assert graph.get_submodule("norm") is norm
    assert not ReplaceIntegerOps({"norm": norm}).run(graph).modified


def test_a_node_that_is_gone_is_declined() -> None:
    result = ReplaceIntegerOps({"gone": Softmax()}).run(canonical())
    assert [decline.reason for decline in result.declines] == ["is not in the graph"]
