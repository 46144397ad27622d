"""Lowering with proof: compared operation by operation; where a kernel is off, the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxquant.backends.check import TargetCheck, check_target
from fxquant.backends.targets import lower
from passes.infra.listing import operation
from passes.infra.verify import run_and_annotate

__all__ = ["Lowered", "lower_checked"]

_MOST_STEPS = 1  # torch's kernels round in another order than the reference


@dataclass(frozen=True)
class Lowered:
    """A target's graph, how it compares with the integer graph, and notes for the report."""

    graph_module: fx.GraphModule
    check: TargetCheck | None
    notes: tuple[str, ...] = ()


def lower_checked(integer: fx.GraphModule, target: str, probe: Sequence[Any]) -> Lowered:
    """Lower an annotated integer graph and compare the result with it on `probe`.

    An operation whose kernel is more than one step off on the same integers runs its reference
    operator instead, with a note. Raises TargetError for an unknown target.
    """
    lowered = lower(integer, target)
    run_and_annotate(lowered, probe, name=f"{target} graph")
    if target == "reference":
        return Lowered(lowered, None)
    check = check_target(integer, lowered, probe)
    wrong = {entry.node: entry for entry in check.operations if entry.largest > _MOST_STEPS}
    if not wrong:
        return Lowered(lowered, check, _kept_reference(lowered, target))
    notes = [
        f"{name}: torch's {entry.operation} is up to {entry.largest} steps off; the reference "
        "operator runs instead"
        for name, entry in wrong.items()
    ]
    lowered = lower(integer, target, keep=frozenset(wrong))
    run_and_annotate(lowered, probe, name=f"{target} graph")
    check = check_target(integer, lowered, probe)
    return Lowered(lowered, check, (*notes, *_kept_reference(lowered, target)))


def _kept_reference(lowered: fx.GraphModule, target: str) -> tuple[str, ...]:
    """Which operators had no kernel of the target's: exact, but not fast."""
    kept = Counter(
        operation(node).removeprefix("fxquant.")
        for node in lowered.graph.nodes
        if node.meta.get("kernel") == "reference" and operation(node).startswith("fxquant.")
    )
    return tuple(
        f"{target} has no kernel for {count} x {name}: the reference operator runs, exact but slow"
        for name, count in sorted(kept.items())
    )
