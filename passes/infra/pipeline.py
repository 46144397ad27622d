"""Runs passes in a checked order, verifies after each, and keeps a record of each."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from passes.infra import listing, verify
from passes.infra.base import Decline, Pass, PassResult
from passes.infra.copies import copy_sharing_tensors
from passes.infra.errors import OrderError, PassError, UnsupportedGraphError, VerificationError
from passes.infra.reproducer import Failure

__all__ = ["PassRecord", "Pipeline", "State"]

# Both graphs err by as much as float32 makes the network err, in any two directions; folded
# tensors are rounded once more.
_TIMES_ITS_OWN = 4.0


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


@dataclass(frozen=True)
class State:
    """A graph between passes, and what is known of it.

    `start` is the graph as it was before the passes `done` ran on it: nothing else changes it.
    `outputs` are what `graph_module` yields on `probe`; None while nobody has asked for them, and
    then nothing has changed since `start`.
    """

    graph_module: fx.GraphModule
    probe: tuple[Any, ...]
    start: fx.GraphModule
    done: tuple[Pass, ...] = ()
    outputs: Any = None

    @classmethod
    def first(cls, graph_module: fx.GraphModule, probe: Sequence[Any]) -> State:
        """`graph_module`, run and annotated. Raises VerificationError where it does not run."""
        state = cls.changed(graph_module, probe)
        return replace(state, outputs=_run(graph_module, probe))

    @classmethod
    def changed(cls, graph_module: fx.GraphModule, probe: Sequence[Any]) -> State:
        """An annotated graph which something else than a pass has changed."""
        return cls(graph_module, tuple(probe), copy_sharing_tensors(graph_module))

    @classmethod
    def copied(cls, graph_module: fx.GraphModule, probe: Sequence[Any]) -> State:
        """A copy of an annotated graph, which itself stays as it is."""
        return cls(copy_sharing_tensors(graph_module), tuple(probe), graph_module)

    def next_stage(self) -> State:
        """A copy of the graph, which itself stays as it is from now on."""
        return replace(State.copied(self.graph_module, self.probe), outputs=self.outputs)

    def known_outputs(self) -> Any:
        """What the graph yields."""
        return _run(self.start, self.probe) if self.outputs is None else self.outputs

    def failed(self, steps: Sequence[Pass]) -> Failure:
        """The last of `steps` failed: the graph as it was when all before it had run.

        They run again, which costs less than a copy before each pass.
        """
        before = copy_sharing_tensors(self.start)
        for step in (*self.done, *steps[:-1]):
            Pipeline([step]).run(before, self.probe)
        return Failure(steps[-1], before, self.probe)


class Pipeline:
    """An ordered list of passes over one graph.

    The order is checked as a whole before anything runs. After each pass that changed something
    the graph is linted and run on the probe inputs; an exact pass must leave the outputs as they
    were, and `invariant`, where one is given, must hold. "As they were" is up to float rounding:
    of a few roundings, or of what float32 makes the graph err by itself, if that is more.

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
        return self.go_on(State.first(graph_module, probe))[1]

    def go_on(self, state: State) -> tuple[State, list[PassRecord]]:
        """Run all passes on the graph of `state` in place: the state then, and the records."""
        records: list[PassRecord] = []
        look = _Look.at(state.graph_module)
        reached = state
        for index, step in enumerate(self.passes):
            try:
                reached, record, look = self._step(step, reached, look)
            except UnsupportedGraphError:
                raise
            except PassError as error:
                error.failure = state.failed(self.passes[: index + 1])
                raise
            records.append(record)
        return reached, records

    def _step(self, step: Pass, state: State, before: _Look) -> tuple[State, PassRecord, _Look]:
        start = time.perf_counter()
        graph_module = state.graph_module
        try:
            result = step.run(graph_module)
        except PassError:
            raise
        except Exception as error:
            raise PassError(f"{step.name}: {type(error).__name__}: {error}") from error
        outputs = self._verify(step, state) if result.modified else state.outputs
        after = _Look.at(graph_module)
        if not result.modified and before.text != after.text:
            raise VerificationError(f"{step.name}: changed the graph but says it did not")
        record = PassRecord(
            name=step.name,
            milliseconds=(time.perf_counter() - start) * 1e3,
            modified=result.modified,
            created=len(after.nodes - before.nodes),
            erased=len(before.nodes - after.nodes),
            declines=result.declines,
            notes=result.notes,
            operations_before=before.operations,
            operations_after=after.operations,
            diff=_diff(before.text, after.text, result, step.name),
            changes=result.changes,
            verified=("same outputs" if step.exact else "runs") if result.modified else "",
        )
        return replace(state, outputs=outputs, done=(*state.done, step)), record, after

    def _verify(self, step: Pass, state: State) -> Any:
        graph_module = state.graph_module
        verify.check_well_formed(graph_module, name=step.name)
        found = verify.run_and_annotate(graph_module, state.probe, name=step.name)
        if step.exact:
            self._check_same(step, state, found)
        if self.invariant is not None:
            try:
                self.invariant(graph_module)
            except Exception as error:
                raise VerificationError(
                    f"{step.name}: left a graph that breaks its stage's promise: {error}"
                ) from error
        return found

    @staticmethod
    def _check_same(step: Pass, state: State, found: Any) -> None:
        expected = state.known_outputs()
        try:
            verify.check_equivalent(expected, found, name=step.name)
        except VerificationError:
            # A network may magnify rounding so far that its own outputs are off by more.
            before = state.failed([step]).before
            own = verify.rounding_error(before, state.probe, expected)
            tolerance = _TIMES_ITS_OWN * own
            if tolerance <= verify.RELATIVE_ERROR:
                raise
            verify.check_equivalent(expected, found, name=step.name, tolerance=tolerance)


@dataclass(frozen=True)
class _Look:
    """How a graph looks: after one pass is before the next."""

    text: str
    operations: Counter[str]
    nodes: frozenset[fx.Node]

    @classmethod
    def at(cls, graph_module: fx.GraphModule) -> _Look:
        return cls(
            listing.to_text(graph_module),
            listing.count_operations(graph_module),
            frozenset(graph_module.graph.nodes),
        )


def _run(graph_module: fx.GraphModule, probe: Sequence[Any]) -> Any:
    # Until it is canonical, a graph may write into its inputs, and give out what it writes into.
    own = copy.deepcopy(tuple(probe))
    return copy.deepcopy(verify.run_and_annotate(graph_module, own, name="before the first pass"))


def check_order(passes: Sequence[Pass]) -> None:
    """Raise OrderError where a pass stands before one that it must come after."""
    for index, step in enumerate(passes):
        for later in passes[index + 1 :]:
            if isinstance(later, step.after):
                raise OrderError(
                    f"{step.name} must come after {later.name}, which stands behind it"
                )


def _diff(before: str, after: str, result: PassResult, name: str) -> str:
    lines = [listing.diff(before, after, name=name), *(f"~ {line}" for line in result.changes)]
    return "\n".join(line for line in lines if line)
