from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import PassError, Rewriter, Rule, RuleTable, call
from tests.passes.checking import float_graph
from tests.passes.models import make

ADD_RELU = call(F.relu, operands=[call(torch.add, operands=[None, None], name="sum")], name="relu")


def last(model: nn.Module) -> fx.Node:
    node = float_graph(model).graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    return node


def nothing(node: fx.Node, rewriter: Rewriter) -> None:
    pass


def test_matches_a_function() -> None:
    node = last(make(lambda self, x: F.relu(x)))
    assert call(F.relu).matches(node)
    assert call(torch.tanh, F.relu).matches(node)
    assert not call(F.relu6).matches(node)
    assert not call(F.relu).matches(node.args[0])


def test_matches_a_method() -> None:
    assert call("contiguous").matches(last(make(lambda self, x: x.contiguous())))


def test_matches_exactly_the_class_of_a_module() -> None:
    node = last(make(lambda self, x: self.layer(x), layer=nn.Conv2d(1, 1, 1)))
    assert call(nn.Conv2d).matches(node)
    assert not call(nn.Module).matches(node)


def test_matches_an_operator_overload() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    assert call(torch.ops.aten.relu.default).matches(node)


def test_captures_named_calls() -> None:
    node = last(make(lambda self, x: F.relu(torch.add(x, 1))))
    found = ADD_RELU.captures(node)
    assert found == {"relu": node, "sum": node.args[0]}


def test_an_operand_that_others_read_does_not_match() -> None:
    model = make(lambda self, x: (F.relu(y := torch.add(x, 1)), y))
    node = float_graph(model).graph.find_nodes(op="call_function", target=F.relu)[0]
    assert not ADD_RELU.matches(node)
    assert call(F.relu, operands=[call(torch.add, shared=True)]).matches(node)


def test_an_operand_of_another_kind_does_not_match() -> None:
    assert not ADD_RELU.matches(last(make(lambda self, x: F.relu(torch.sub(x, 1)))))
    assert not ADD_RELU.matches(last(make(lambda self, x: F.relu(x))))
    assert not call(torch.add, operands=[None] * 3).matches(
        last(make(lambda self, x: torch.add(x, 1)))
    )


def test_a_condition_on_the_node() -> None:
    halves = call(torch.mul, when=lambda node: node.args[1] == 0.5)
    assert halves.matches(last(make(lambda self, x: torch.mul(x, 0.5))))
    assert not halves.matches(last(make(lambda self, x: torch.mul(x, 2.0))))


def test_a_call_needs_a_target() -> None:
    with pytest.raises(ValueError, match="target"):
        call()


def test_a_table_finds_rules_by_target_in_order() -> None:
    first = Rule("first", call(F.relu, torch.tanh), nothing)
    second = Rule("second", call(F.relu), nothing)
    table = RuleTable([first, second, Rule("other", call(torch.exp), nothing)])
    node = last(make(lambda self, x: F.relu(x)))
    assert list(table.candidates(node)) == [first, second]
    assert list(table.candidates(node.args[0])) == []


def test_a_table_takes_the_first_rule_with_nothing_against_it() -> None:
    fired = []
    table = RuleTable(
        [
            Rule("elsewhere", ADD_RELU, lambda node, rewriter: fired.append("elsewhere")),
            Rule(
                "refused",
                call(F.relu),
                lambda node, rewriter: fired.append("refused"),
                check=lambda node: "too wide",
            ),
            Rule("taken", call(F.relu), lambda node, rewriter: fired.append("taken")),
        ]
    )
    graph_module = float_graph(make(lambda self, x: F.relu(x)))
    (node,) = graph_module.graph.find_nodes(op="call_function", target=F.relu)
    assert table.apply(node, Rewriter(graph_module)) is None
    assert fired == ["taken"]


def test_a_table_gives_the_first_reason() -> None:
    rules = [
        Rule(name, call(F.relu), nothing, check=lambda node, name=name: f"no {name}")
        for name in ("a", "b")
    ]
    graph_module = float_graph(make(lambda self, x: F.relu(x)))
    (node,) = graph_module.graph.find_nodes(op="call_function", target=F.relu)
    assert RuleTable(rules).apply(node, Rewriter(graph_module)) == "a: no a"


def test_rules_have_names_of_their_own() -> None:
    with pytest.raises(PassError, match="several rules are called twice"):
        RuleTable([Rule("twice", call(F.relu), nothing)] * 2)
