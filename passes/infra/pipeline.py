"""Runs passes in a checked order, verifies after each, and keeps a record of each."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from passes.infra import listing, verify
from passes.infra.base import Decline, Pass
from passes.infra.errors import OrderError, PassError, VerificationError

__all__ = ["PassRecord", "Pipeline", "copy_sharing_tensors"]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its time, the nodes it made and erased, its declines, its diff."""

    name: str
    milliseconds: float
    modified: bool
    created: int
    erased: int
    declines: tuple[Decline, ...]
    notes: tuple[str, ...]
    operations_before: Counter[str]
    operations_after: Counter[str]
    diff: str = field(repr=False)


class Pipeline:
    """An ordered list of passes over one graph.

    The order is checked as a whole before anything runs. After each pass the graph is linted
    and run on the probe inputs; an exact pass must leave the outputs as they were, and the
    invariant, where one is given, must hold.

    Raises OrderError on construction; VerificationError, naming pass and node, from `run`.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        invariant: verify.Invariant | None = None,
        reproducer: Path | None = None,
    ) -> None:
        self.passes = tuple(passes)
        self.invariant = invariant
        self.reproducer = reproducer
        check_order(self.passes)

    def run(self, graph_module: fx.GraphModule, probe: Sequence[Any]) -> list[PassRecord]:
        """Run all passes on `graph_module` in place and return their records."""
        records: list[PassRecord] = []
        # Until it is canonical, a graph may write into its inputs: it gets its own.
        own = copy.deepcopy(tuple(probe))
        outputs = verify.run_and_annotate(graph_module, own, name="before the first pass")
        for step in self.passes:
            before_text = listing.to_text(graph_module)
            before_count = listing.count_operations(graph_module)
            before_nodes = set(graph_module.graph.nodes)
            start = time.perf_counter()
            try:
                result = step.run(graph_module)
                if result.modified:
                    outputs = self._verify(step, graph_module, probe, outputs)
            except PassError:
                self._reproduce(step, before_text)
                raise
            except Exception as error:
                self._reproduce(step, before_text)
                raise PassError(f"{step.name}: {type(error).__name__}: {error}") from error
            after_text = listing.to_text(graph_module)
            after_nodes = set(graph_module.graph.nodes)
            if not result.modified and before_text != after_text:
                raise VerificationError(f"{step.name}: changed the graph but says it did not")
            records.append(
                PassRecord(
                    name=step.name,
                    milliseconds=(time.perf_counter() - start) * 1e3,
                    modified=result.modified,
                    created=len(after_nodes - before_nodes),
                    erased=len(before_nodes - after_nodes),
                    declines=result.declines,
                    notes=result.notes,
                    operations_before=before_count,
                    operations_after=listing.count_operations(graph_module),
                    diff=listing.diff(before_text, after_text, name=step.name),
                )
            )
        return records

    def _verify(
        self, step: Pass, graph_module: fx.GraphModule, probe: Sequence[Any], expected: Any
    ) -> Any:
        verify.check_well_formed(graph_module, name=step.name)
        found = verify.run_and_annotate(graph_module, probe, name=step.name)
        if step.exact:
            verify.check_equivalent(expected, found, name=step.name)
        if self.invariant is not None:
            self.invariant(graph_module)
        return found

    def _reproduce(self, step: Pass, text: str) -> None:
        if self.reproducer is not None:
            self.reproducer.mkdir(parents=True, exist_ok=True)
            (self.reproducer / f"before_{step.name}.txt").write_text(text)


def check_order(passes: Sequence[Pass]) -> None:
    """Raise OrderError where a pass stands before one that it must come after."""
    for index, step in enumerate(passes):
        for later in passes[index + 1 :]:
            if isinstance(later, step.after):
                raise OrderError(
                    f"{step.name} must come after {later.name}, which stands behind it"
                )


def copy_sharing_tensors(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of graph and modules whose parameters and buffers are the same tensors.

    Passes replace tensors and never write into them, so that stages can share what did not
    change and a large network is not held once for every stage.
    """
    shared: dict[int, Any] = {}
    for tensor in (*graph_module.parameters(), *graph_module.buffers()):
        shared[id(tensor)] = tensor
    # Constants that tracing left as plain attributes are shared as well.
    for module in graph_module.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                shared[id(value)] = value
    return copy.deepcopy(graph_module, shared)
