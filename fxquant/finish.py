"""The end of every compile: from the simulated graph to a target's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fxquant.artifact.packing import tensor_bytes
from fxquant.backends import Lowered, lower_checked
from fxquant.compiled import CompiledModel
from fxquant.plan.plan import Plan, make_plan
from fxquant.report.report import QuantizerRow
from fxquant.report.summary import check_summary
from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.to_integer import to_integer
from fxquant.to_integer.invariants import check_integer_graph, check_integers_only
from passes.infra.verify import run_and_annotate

__all__ = ["lower_simulated", "with_simulated"]


def lower_simulated(
    simulated: fx.GraphModule, plan: Plan, target: str, probe: Sequence[Any]
) -> tuple[fx.GraphModule, Lowered]:
    """The integer graph of a calibrated simulated graph, and its lowering to `target`.

    Raises TargetError for an unknown target, CompileError where a stage breaks its promise.
    """
    integer = to_integer(simulated, plan)
    run_and_annotate(integer, probe, name="integer graph")
    check_integer_graph(integer)
    if plan.requantization == "dyadic":
        check_integers_only(integer, plan.reasons)
    return integer, lower_checked(integer, target, probe)


def with_simulated(
    q: CompiledModel, simulated: fx.GraphModule, notes: Sequence[str] = ()
) -> CompiledModel:
    """`q` lowered again from another simulated graph of the same nodes; `notes` for its report."""
    plan = make_plan(q.stages["fused"], q.recipe)
    integer, lowered = lower_simulated(simulated, plan, q.target, q.example)
    proofs = {row.path: row.proof for row in q.report.quantizers}
    report = replace(
        q.report,
        quantizers=tuple(
            QuantizerRow(path, module.detail, proofs.get(path, ""))
            for path, module in simulated.named_modules()
            if isinstance(module, ActivationQuantizer)
        ),
        notes=(*q.report.notes, *notes),
        target_notes=lowered.notes,
        size_bytes=tensor_bytes(integer),
        target_check=check_summary(lowered.check),
    )
    stages = {
        "float": q.stages["float"],
        "fused": q.stages["fused"],
        "simulated": simulated,
        "integer": integer,
        q.target: lowered.graph_module,
    }
    return CompiledModel(stages, target=q.target, recipe=q.recipe, report=report, example=q.example)
