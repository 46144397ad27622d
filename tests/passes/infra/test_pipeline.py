from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import (
    Decline,
    OrderError,
    Pass,
    PassError,
    PassResult,
    Pipeline,
    Rewriter,
    VerificationError,
)
from passes.infra.listing import count_operations
from passes.infra.pipeline import State
from passes.infra.verify import RELATIVE_ERROR, rounding_error, run_and_annotate
from tests.passes.checking import float_graph
from tests.passes.models import image, make


class Replace(Pass):
    """Calls `new` where `old` was called."""

    def __init__(self, old: Any = F.relu, new: Any = torch.relu) -> None:
        self.old, self.new = old, new

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        rewriter = Rewriter(graph_module)
        for node in graph_module.graph.find_nodes(op="call_function", target=self.old):
            rewriter.replace_call(node, self.new, node.args)
        return PassResult(rewriter.finish())


class ReplaceInexactly(Replace):
    exact = False


class AfterReplace(Pass):
    after = (Replace,)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        declines = tuple(Decline.at(node, "may not") for node in list(graph_module.graph.nodes)[:1])
        return PassResult(modified=False, declines=declines, notes=("looked",))


class Liar(Pass):
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        Replace().run(graph_module)
        return PassResult(modified=False)


class Broken(Pass):
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        raise KeyError("conv9")


def relu() -> fx.GraphModule:
    return float_graph(make(lambda self, x: torch.exp(F.relu(x))))


def test_records_what_each_pass_did() -> None:
    first, second = Pipeline([Replace(), AfterReplace()]).run(relu(), (image(),))
    assert (first.name, first.modified, first.created, first.erased) == ("replace", True, 1, 1)
    assert first.milliseconds > 0
    assert first.operations_before == first.operations_after == {"relu": 1, "exp": 1}
    assert "-relu = relu(x, inplace=False) f32[1,3,8,8]\n+relu = relu(x)" in first.diff
    assert (second.name, second.modified, second.diff) == ("after_replace", False, "")
    assert second.declines == (Decline("x", "may not"),)
    assert second.notes == ("looked",)


def test_annotates_before_the_first_pass() -> None:
    graph_module = relu()
    Pipeline([]).run(graph_module, (image(),))
    assert all("tensor" in node.meta for node in graph_module.graph.nodes)


class Halve(Pass):
    """Halves a weight: the listing stays the same."""

    exact = False

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        conv = nn.Conv2d(3, 3, 1)
        conv.weight = nn.Parameter(graph_module.conv.weight / 2)  # type: ignore[union-attr,operator]
        Rewriter(graph_module).set_module("conv", conv)
        return PassResult(True, changes=("conv: weight times 0.5",))


def test_the_diff_names_layers_whose_tensors_changed() -> None:
    (record,) = Pipeline([Halve()]).run(
        float_graph(make(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 3, 1))), (image(),)
    )
    assert record.diff == "~ conv: weight times 0.5"
    assert record.changes == ("conv: weight times 0.5",)


def test_the_record_says_what_was_verified() -> None:
    steps = [Replace(), ReplaceInexactly(torch.relu, torch.tanh), AfterReplace()]
    records = Pipeline(steps[:2]).run(relu(), (image(),))
    records += Pipeline([AfterReplace()]).run(relu(), (image(),))
    assert [record.verified for record in records] == ["same outputs", "runs", ""]


def test_an_order_that_a_pass_forbids_is_refused_up_front() -> None:
    with pytest.raises(OrderError, match="after_replace must come after replace, which stands"):
        Pipeline([AfterReplace(), Replace()])
    # A subclass of what must come first must come first too.
    with pytest.raises(OrderError, match="must come after replace_inexactly"):
        Pipeline([AfterReplace(), ReplaceInexactly()])


def test_what_a_pass_must_come_after_may_be_missing() -> None:
    assert len(Pipeline([AfterReplace()]).run(relu(), (image(),))) == 1


def test_an_exact_pass_that_changes_outputs_is_named() -> None:
    with pytest.raises(VerificationError, match=r"^replace: is exact but output differs"):
        Pipeline([Replace(new=torch.tanh)]).run(relu(), (image(),))


def test_an_inexact_pass_may_change_outputs() -> None:
    step = ReplaceInexactly(new=torch.tanh)
    (record,) = Pipeline([step]).run(relu(), (image(),))
    assert record.operations_after == {"tanh": 1, "exp": 1}


def test_later_passes_are_compared_with_the_latest_outputs() -> None:
    steps = [ReplaceInexactly(new=torch.tanh), Replace(torch.exp, torch.exp)]
    assert len(Pipeline(steps).run(relu(), (image(),))) == 2


def test_a_graph_that_does_not_run_names_pass_and_node() -> None:
    with pytest.raises(VerificationError, match=r"^replace: running relu \(root\) failed"):
        Pipeline([Replace(new=torch.bmm)]).run(relu(), (image(),))


def test_a_pass_that_denies_its_change_is_named() -> None:
    with pytest.raises(VerificationError, match=r"^liar: changed the graph but says it did not"):
        Pipeline([Liar()]).run(relu(), (image(),))


def test_a_pass_that_raises_is_named() -> None:
    with pytest.raises(PassError, match=r"^broken: KeyError: 'conv9'"):
        Pipeline([Broken()]).run(relu(), (image(),))


def test_an_invariant_is_checked_after_each_change() -> None:
    def no_tanh(graph_module: fx.GraphModule) -> None:
        if graph_module.graph.find_nodes(op="call_function", target=torch.tanh):
            raise VerificationError("holds tanh")

    steps = [Replace(), ReplaceInexactly(torch.relu, torch.tanh)]
    with pytest.raises(VerificationError, match=r"^replace_inexactly: .*promise: holds tanh"):
        Pipeline(steps, invariant=no_tanh).run(relu(), (image(),))


# -- what is known of a graph ----------------------------------------------------------------------


def counted() -> tuple[fx.GraphModule, list[int]]:
    """A graph, and a list that grows with every run of it and of its copies."""
    runs: list[int] = []
    model = make(lambda self, x: torch.exp(F.relu(self.conv(x))), conv=nn.Conv2d(3, 3, 1))
    model.conv.register_forward_hook(lambda *arguments: runs.append(1))  # type: ignore[union-attr]
    graph_module = float_graph(model)
    return graph_module, runs


def test_a_stage_begins_with_the_outputs_of_the_one_before() -> None:
    graph_module, runs = counted()
    state = State.first(graph_module, (image(),))
    assert len(runs) == 1
    state, _ = Pipeline([Replace()]).go_on(state.next_stage())
    assert len(runs) == 2
    Pipeline([Replace(torch.relu, F.relu)]).go_on(state.next_stage())
    assert len(runs) == 3
    with pytest.raises(VerificationError, match=r"^replace: is exact but output differs"):
        Pipeline([Replace(torch.relu, torch.tanh)]).go_on(state.next_stage())


def test_passes_that_change_nothing_run_nothing() -> None:
    graph_module, runs = counted()
    run_and_annotate(graph_module, (image(),), name="probe")
    state, _ = Pipeline([AfterReplace()]).go_on(State.copied(graph_module, (image(),)))
    assert len(runs) == 1
    with pytest.raises(VerificationError, match=r"^replace: is exact but output differs"):
        Pipeline([Replace(new=torch.tanh)]).go_on(state)


def test_a_failure_holds_the_graph_with_the_passes_of_earlier_pipelines() -> None:
    state, _ = Pipeline([Replace()]).go_on(State.first(relu(), (image(),)))
    with pytest.raises(PassError) as caught:
        Pipeline([Broken()]).go_on(state)
    assert count_operations(caught.value.failure.before) == {"relu": 1, "exp": 1}
    assert caught.value.failure.before.graph.find_nodes(op="call_function", target=torch.relu)


# -- a graph that magnifies rounding ---------------------------------------------------------------


class Divide(Pass):
    """Divides by `divisor` where the graph multiplied."""

    def __init__(self, divisor: float) -> None:
        self.divisor = divisor

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        rewriter = Rewriter(graph_module)
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.mul):
            rewriter.replace_call(node, torch.div, (node.args[0], self.divisor))
        return PassResult(rewriter.finish())


def magnifying() -> fx.GraphModule:
    """One step of a float32 near 1e3 is a thousandth of what the subtraction leaves."""
    return float_graph(make(lambda self, x: torch.sub(torch.mul(F.relu(x) + 1e4, 0.1), 1e3)))


def test_an_exact_pass_may_err_as_float32_makes_the_graph_err() -> None:
    graph_module = magnifying()
    outputs = run_and_annotate(graph_module, (image(),), name="probe")
    assert rounding_error(graph_module, (image(),), outputs) > RELATIVE_ERROR
    assert Pipeline([Divide(10)]).run(graph_module, (image(),))[0].verified == "same outputs"


def test_a_graph_that_magnifies_rounding_hides_no_wrong_pass() -> None:
    with pytest.raises(VerificationError, match=r"^divide: is exact but output differs"):
        Pipeline([Divide(10.001)]).run(magnifying(), (image(),))


def test_earlier_inexact_passes_are_no_rounding() -> None:
    steps = [ReplaceInexactly(new=torch.tanh), Replace(torch.exp, torch.sin)]
    with pytest.raises(VerificationError, match=r"^replace: is exact but output differs"):
        Pipeline(steps).run(relu(), (image(),))
