"""For every operation: integers or float and why, and its share of the multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxquant.frontend.run_counts import count_by_running
from fxquant.plan.macs import images_of, multiply_accumulates
from fxquant.plan.operations import Kind
from fxquant.plan.plan import Plan
from passes import module_path
from passes.infra.listing import operation

__all__ = ["CoverageRow", "coverage"]


@dataclass(frozen=True)
class CoverageRow:
    """One operation: `macs` are for one image, None where nobody can count them.

    `runs_in` is int8, int16, dynamic int8, weight-only or float.
    """

    node: str
    path: str
    operation: str
    runs_in: str
    macs: int | None
    reason: str = ""


def coverage(fused: fx.GraphModule, plan: Plan, probe: Sequence[Any]) -> tuple[CoverageRow, ...]:
    """One row for each operation of the fused graph, in execution order.

    What no formula describes is counted while it runs on `probe`.
    """
    counts: dict[str, int | None] = {
        node.name: multiply_accumulates(node, fused)
        for node in fused.graph.nodes
        if node.name in plan.kinds
    }
    unseen = [name for name, macs in counts.items() if not macs and plan.kinds[name] is Kind.FLOAT]
    if unseen:
        images = images_of(fused.graph)
        found = count_by_running(fused, unseen, probe)
        counts |= {name: macs and macs // images for name, macs in found.items()}
    bits = {name: site.spec.bits for site in plan.values for name in site.nodes}
    rows = []
    for node in fused.graph.nodes:
        if node.name not in plan.kinds:
            continue
        reason = plan.reasons.get(node.name, "")
        runs_in = "float"
        if node.name in plan.dynamic:
            runs_in, reason = "dynamic int8", ""
        elif not reason:
            operands = [bits[source.name] for source in node.all_input_nodes if source.name in bits]
            runs_in = "int16" if max([8, *operands]) > 8 else "int8"
        elif node.name in plan.weights:
            runs_in = "weight-only"
        macs = counts[node.name]
        rows.append(
            CoverageRow(node.name, module_path(node), operation(node), runs_in, macs, reason)
        )
    return tuple(rows)
