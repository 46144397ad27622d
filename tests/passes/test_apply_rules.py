from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from passes import ApplyRules, PassError, Rewriter, Rule, add_relu, call
from tests.passes.checking import check
from tests.passes.models import annotated, image, make


def to_add_relu(node: fx.Node, rewriter: Rewriter) -> None:
    sum_ = node.args[0]
    assert isinstance(sum_, fx.Node)
    rewriter.replace_call(node, add_relu, sum_.args, sources=[sum_])
    rewriter.erase(sum_)


def drop(node: fx.Node, rewriter: Rewriter) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rewriter.absorb(node, source)


FUSE_ADD_RELU = Rule("add_relu", call(F.relu, operands=[call(torch.add)]), to_add_relu)
DROP_DOUBLE_RELU = Rule(
    "double_relu", call(F.relu, operands=[call(F.relu, add_relu, shared=True)]), drop
)


class FuseExample(ApplyRules):
    exact = True


def test_rewrites_where_a_rule_stands() -> None:
    check(
        FuseExample([FUSE_ADD_RELU]),
        make(lambda self, x: F.relu(torch.add(x, torch.tanh(x)))),
        image(),
        expect="""
            x = input                     f32[1,3,8,8]
            tanh = tanh(x)                f32[1,3,8,8]
            relu = add_relu(x, tanh)      f32[1,3,8,8]
            return relu""",
    )


def test_runs_to_the_fixpoint() -> None:
    # The second rule gets its chance only when the first has made an add_relu.
    model = make(lambda self, x: F.relu(F.relu(F.relu(torch.add(x, x)))))
    found = check(FuseExample([DROP_DOUBLE_RELU, FUSE_ADD_RELU]), model, image())
    assert found.operations == {"add_relu": 1}


def test_leaves_a_graph_without_matches_alone() -> None:
    model = make(lambda self, x: torch.tanh(x))
    assert check(FuseExample([FUSE_ADD_RELU]), model, image(), modified=False).reasons == ()


def test_declines_with_the_reason_of_the_rule() -> None:
    refusing = Rule("never", call(F.relu), drop, check=lambda node: "is needed")
    model = make(lambda self, x: torch.exp(F.relu(x)))
    found = check(FuseExample([refusing]), model, image(), modified=False)
    assert [(each.node, each.reason) for each in found.declines] == [("relu", "never: is needed")]


def test_declines_once_for_each_node() -> None:
    refusing = Rule("never", call(torch.tanh), drop, check=lambda node: "is needed")
    model = make(lambda self, x: F.relu(torch.add(x, torch.tanh(x))))
    found = check(FuseExample([refusing, FUSE_ADD_RELU]), model, image(), modified=True)
    assert found.reasons == ("never: is needed",)


def test_a_rule_that_changes_nothing_settles() -> None:
    idle = Rule("idle", call(F.relu), lambda node, rewriter: None)
    check(FuseExample([idle]), make(lambda self, x: F.relu(x)), image(), modified=False)


def test_rules_that_never_settle_are_an_error() -> None:
    def again(node: fx.Node, rewriter: Rewriter) -> None:
        rewriter.replace_call(node, F.relu, node.args)

    graph_module = annotated(make(lambda self, x: F.relu(x)), image())
    with pytest.raises(PassError, match="fuse_example: does not settle: relu still changes"):
        FuseExample([Rule("again", call(F.relu), again)]).run(graph_module)


def test_a_subclass_names_the_pass() -> None:
    assert FuseExample([]).name == "fuse_example"
