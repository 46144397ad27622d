"""For every operation: integers or float and why, and its share of the multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxquant.plan.macs import multiply_accumulates
from fxquant.plan.plan import Plan
from passes import module_path
from passes.infra.listing import operation

__all__ = ["CoverageRow", "coverage"]


@dataclass(frozen=True)
class CoverageRow:
    """One operation: `macs` are for one image.

    `runs_in` is int8, int16, dynamic int8, weight-only or float.
    """

    node: str
    path: str
    operation: str
    runs_in: str
    macs: int
    reason: str = ""


def coverage(fused: fx.GraphModule, plan: Plan) -> tuple[CoverageRow, ...]:
    """One row for each operation of the fused graph, in execution order."""
    bits = {name: site.spec.bits for site in plan.values for name in site.nodes}
    rows = []
    for node in fused.graph.nodes:
        if node.name not in plan.kinds:
            continue
        reason = plan.reasons.get(node.name, "")
        runs_in = "float"
        if node.name in plan.dynamic:
            runs_in = "dynamic int8"
        elif not reason:
            operands = [bits[source.name] for source in node.all_input_nodes if source.name in bits]
            runs_in = "int16" if max([8, *operands]) > 8 else "int8"
        elif node.name in plan.weights:
            runs_in = "weight-only"
        macs = multiply_accumulates(node, fused)
        rows.append(
            CoverageRow(node.name, module_path(node), operation(node), runs_in, macs, reason)
        )
    return tuple(rows)
