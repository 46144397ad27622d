"""Lowering with proof: compared operation by operation; where a kernel is off, the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxquant.backends.check import TargetCheck
from fxquant.backends.target import LoweredGraph, Target
from fxquant.errors import CompileError
from passes import PassRecord
from passes.infra.listing import operation
from passes.infra.verify import run_and_annotate

__all__ = ["Lowered", "lower_checked"]


@dataclass(frozen=True)
class Lowered:
    """A target's graph and how to run it, how it compares, and what the report must say.

    `check` is None where the target is what others are compared with. `records` are those of the
    target's own passes.
    """

    graph_module: fx.GraphModule
    run: Callable[..., Any]
    check: TargetCheck | None
    records: tuple[PassRecord, ...] = ()
    notes: tuple[str, ...] = ()


def lower_checked(integer: fx.GraphModule, target: Target, probe: Sequence[Any]) -> Lowered:
    """Lower an annotated integer graph and compare the result with it on `probe`.

    An operation that is further off than the target's tolerance on the same integers runs its
    reference operator instead, with a note. Raises CompileError where that does not help.
    """
    lowered, check = _lower(integer, target, probe, frozenset())
    notes: list[str] = []
    wrong = _beyond(check, target)
    if wrong:
        notes = [
            f"{name}: {target.name}'s {kernel} is up to {steps} steps off; the reference operator "
            "runs instead"
            for name, (kernel, steps) in wrong.items()
        ]
        lowered, check = _lower(integer, target, probe, frozenset(wrong))
        if _beyond(check, target):
            raise CompileError(_report(f"{target.name} is off where the reference operator runs"))
    if target.tolerance == 0 and check is not None and _is_off(check):
        raise CompileError(_report(f"{target.name} yields other outputs than the integer graph"))
    graph = lowered.graph_module
    execution = target.execution(graph, probe)
    notes += [*lowered.notes, *_kept_reference(graph, target.name, wrong), *execution.notes]
    return Lowered(graph, execution.run, check, lowered.records, tuple(notes))


def _lower(
    integer: fx.GraphModule, target: Target, probe: Sequence[Any], keep: frozenset[str]
) -> tuple[LoweredGraph, TargetCheck | None]:
    lowered = target.lower(integer, probe, keep)
    if not lowered.has_run:
        run_and_annotate(lowered.graph_module, probe, name=f"{target.name} graph")
    return lowered, target.check(integer, lowered.graph_module, probe)


def _is_off(check: TargetCheck) -> bool:
    return bool(check.output_differing) and not check.approximated


def _report(what: str) -> str:
    return f'target {what}; please report it, and compile with target="reference" meanwhile'


def _beyond(check: TargetCheck | None, target: Target) -> dict[str, tuple[str, int]]:
    """The operations that are further off than the target may be: kernel and steps by node."""
    found = () if check is None else check.operations
    return {
        entry.node: (entry.operation, entry.largest)
        for entry in found
        if entry.largest > target.tolerance
    }


def _kept_reference(
    lowered: fx.GraphModule, target: str, wrong: Collection[str]
) -> tuple[str, ...]:
    """Which operators had no kernel of the target's, `wrong` apart: exact, but not fast."""
    kept = Counter(
        operation(node).removeprefix("fxquant.")
        for node in lowered.graph.nodes
        if node.meta.get("kernel") == "reference"
        and node.meta["integer"] not in wrong
        and operation(node).startswith("fxquant.")
    )
    return tuple(
        f"{target} has no kernel for {count} x {name}: the reference operator runs, exact but slow"
        for name, count in sorted(kept.items())
    )
