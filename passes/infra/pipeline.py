"""Runs passes in a checked order, verifies after each, and keeps a record of each."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from passes.infra import listing, verify
from passes.infra.base import Decline, Pass, PassResult
from passes.infra.errors import OrderError, PassError, UnsupportedGraphError, VerificationError
from passes.infra.reproducer import Failure

__all__ = ["PassRecord", "Pipeline", "copy_sharing_tensors"]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its time, the nodes it made and erased, its declines, its diff.

    `verified` says what was compared after it: "same outputs" up to float rounding, "runs" for a
    pass that is not exact, "" where it changed nothing. `diff` is that of the listings, and a
    line for each layer whose tensors changed (``~ fc1: ...``).
    """

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
    changes: tuple[str, ...] = ()
    verified: str = ""


class Pipeline:
    """An ordered list of passes over one graph.

    The order is checked as a whole before anything runs. After each pass that changed something
    the graph is linted and run on the probe inputs; an exact pass must leave the outputs as they
    were, and `invariant`, where one is given, must hold.

    Raises OrderError on construction; PassError, naming pass and node, from `run`. Its `failure`
    is what `write_reproducer` of `passes.infra.reproducer` takes.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        invariant: verify.Invariant | None = None,
    ) -> None:
        self.passes = tuple(passes)
        self.invariant = invariant
        check_order(self.passes)

    def run(self, graph_module: fx.GraphModule, probe: Sequence[Any]) -> list[PassRecord]:
        """Run all passes on `graph_module` in place and return their records."""
        original = copy_sharing_tensors(graph_module)
        # Until it is canonical, a graph may write into its inputs: it gets its own.
        own = copy.deepcopy(tuple(probe))
        outputs = verify.run_and_annotate(graph_module, own, name="before the first pass")
        records: list[PassRecord] = []
        for index, step in enumerate(self.passes):
            try:
                record, outputs = self._step(step, graph_module, probe, outputs)
            except UnsupportedGraphError:
                raise
            except PassError as error:
                # What ran before the failure runs again, rather than a copy before each pass.
                Pipeline(self.passes[:index]).run(original, probe)
                error.failure = Failure(step, original, tuple(probe))
                raise
            records.append(record)
        return records

    def _step(
        self, step: Pass, graph_module: fx.GraphModule, probe: Sequence[Any], outputs: Any
    ) -> tuple[PassRecord, Any]:
        before_text = listing.to_text(graph_module)
        before_count = listing.count_operations(graph_module)
        before_nodes = set(graph_module.graph.nodes)
        start = time.perf_counter()
        try:
            result = step.run(graph_module)
        except PassError:
            raise
        except Exception as error:
            raise PassError(f"{step.name}: {type(error).__name__}: {error}") from error
        if result.modified:
            outputs = self._verify(step, graph_module, probe, outputs)
        after_text = listing.to_text(graph_module)
        after_nodes = set(graph_module.graph.nodes)
        if not result.modified and before_text != after_text:
            raise VerificationError(f"{step.name}: changed the graph but says it did not")
        record = PassRecord(
            name=step.name,
            milliseconds=(time.perf_counter() - start) * 1e3,
            modified=result.modified,
            created=len(after_nodes - before_nodes),
            erased=len(before_nodes - after_nodes),
            declines=result.declines,
            notes=result.notes,
            operations_before=before_count,
            operations_after=listing.count_operations(graph_module),
            diff=_diff(before_text, after_text, result, step.name),
            changes=result.changes,
            verified=("same outputs" if step.exact else "runs") if result.modified else "",
        )
        return record, outputs

    def _verify(
        self, step: Pass, graph_module: fx.GraphModule, probe: Sequence[Any], expected: Any
    ) -> Any:
        verify.check_well_formed(graph_module, name=step.name)
        found = verify.run_and_annotate(graph_module, probe, name=step.name)
        if step.exact:
            verify.check_equivalent(expected, found, name=step.name)
        if self.invariant is not None:
            try:
                self.invariant(graph_module)
            except Exception as error:
                raise VerificationError(
                    f"{step.name}: left a graph that breaks its stage's promise: {error}"
                ) from error
        return found


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


def _diff(before: str, after: str, result: PassResult, name: str) -> str:
    lines = [listing.diff(before, after, name=name), *(f"~ {line}" for line in result.changes)]
    return "\n".join(line for line in lines if line)
