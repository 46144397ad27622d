"""A float rewrite is one file with a pass and one line in the list of a pipeline."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from passes import Canonicalize, Decline, Pass, PassResult, Pipeline, Rewriter
from tests.passes.checking import Function, check, float_graph


class CancelNegations(Pass):
    """Cancel a negation of a negation.

        before              after
        a = neg(x)          y = relu(x)
        b = neg(a)
        y = relu(b)

    Declines where the inner negation is read by anything else.
    """

    exact = True
    after = (Canonicalize,)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        declines = []
        for outer in list(graph_module.graph.nodes):
            inner = outer.args[0] if outer.target is torch.neg else None
            if not isinstance(inner, fx.Node) or inner.target is not torch.neg:
                continue
            if len(inner.users) > 1:
                declines.append(Decline.at(inner, f"is read by {len(inner.users)} operations"))
                continue
            rewriter.absorb(outer, inner.all_input_nodes[0])
        return PassResult(rewriter.finish(), tuple(declines))


def test_cancels_two_negations() -> None:
    check(
        CancelNegations(),
        Function(lambda self, x: torch.relu(torch.neg(torch.neg(x)))),
        torch.randn(2, 3),
        modified=True,
        expect="""
        x    = input            f32[2,3]
        relu = relu(x)          f32[2,3]
        return relu""",
    )


def test_declines_where_the_inner_one_is_read_twice() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        y = torch.neg(x)
        return torch.neg(y) + y

    found = check(CancelNegations(), Function(forward), torch.randn(2, 3), modified=False)

    assert found.reasons == ("is read by 2 operations",)


def test_a_pipeline_verifies_and_records_it() -> None:
    graph = float_graph(Function(lambda self, x: torch.neg(torch.neg(x))))

    records = Pipeline([Canonicalize(), CancelNegations()]).run(graph, (torch.randn(2, 3),))

    assert (records[-1].name, records[-1].erased) == ("cancel_negations", 2)
    assert "-neg" in records[-1].diff
