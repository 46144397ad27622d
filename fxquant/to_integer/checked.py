"""The integer graph with what its stage promises proven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxquant.plan.plan import Plan
from fxquant.to_integer.convert import to_integer
from fxquant.to_integer.invariants import check_integer_graph, check_integers_only
from passes.infra.verify import run_and_annotate

__all__ = ["to_checked_integer"]


def to_checked_integer(
    simulated: fx.GraphModule, plan: Plan, probe: Sequence[Any]
) -> fx.GraphModule:
    """The integer graph of a calibrated simulated graph, annotated on `probe`.

    Raises CompileError where it breaks a promise of its stage.
    """
    integer = to_integer(simulated, plan)
    run_and_annotate(integer, probe, name="integer graph")
    check_integer_graph(integer)
    if plan.requantization == "dyadic":
        check_integers_only(integer, plan.reasons)
    return integer
