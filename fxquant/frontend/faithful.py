"""Does a graph compute what the model computes? On one sample, beside the model itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import ModelError, TraceError
from fxquant.frontend.inputs import arguments
from passes import VerificationError
from passes.infra.pipeline import State
from passes.infra.verify import check_equivalent, run_and_annotate

__all__ = [
    "Compared",
    "check_repeatable",
    "check_same_outputs",
    "compared_on_one",
    "difference",
    "outputs_of",
    "run_traced",
]


@dataclass(frozen=True)
class Compared:
    """A graph that has run on one sample, where it gave what the model gives: `expected`."""

    state: State
    expected: Any


def run_traced(traced: fx.GraphModule, batch: tuple[Any, ...]) -> State:
    """The graph run on one sample of `batch`, because it is verified there again and again.

    On the whole batch where it does not run on that: the first dimension of a recurrent layer's
    state is no batch. Raises ModelError where it does not run at all.
    """
    try:
        return State.first(traced, _one(batch))
    except VerificationError:
        pass
    try:
        return State.first(traced, batch)
    except VerificationError as error:
        why = str(error).partition(": ")[2]
        raise ModelError(f"the model does not run on the first calibration batch: {why}") from error


def compared_on_one(
    model: nn.Module, names: Sequence[str], graph: fx.GraphModule, batch: Sequence[Any]
) -> Compared | None:
    """What `graph` and `model` give on one sample of `batch`; None where that is no input of it.

    Raises VerificationError where the graph does not run, or gives something else.
    """
    one = _one(batch)
    try:
        expected = outputs_of(model, names, one)
    except Exception:
        return None
    state = State.first(graph, one)
    check_equivalent(expected, state.outputs, name="the graph")
    return Compared(state, expected)


def outputs_of(model: nn.Module, names: Sequence[str], probe: tuple[Any, ...]) -> Any:
    """What the model gives, which may write into its inputs and give out what it writes into."""
    positional, named = arguments(model, names, copy.deepcopy(probe))
    with torch.no_grad():
        return copy.deepcopy(model(*positional, **named))


def check_same_outputs(
    model: nn.Module, names: Sequence[str], probe: tuple[Any, ...], expected: Any, found: Any
) -> None:
    """`expected` is what the model gives on `probe`, `found` what a graph gives.

    Raises TraceError where they differ, or ModelError where another call of the model would, too.
    """
    kind = type(model).__name__
    try:
        check_equivalent(expected, found, name="the float graph")
    except VerificationError as error:
        check_repeatable(model, names, probe, expected)
        raise TraceError(
            f"{kind} computes something else than what was traced of it: {error}; does forward "
            "depend on random numbers, or on what it was called with before?"
        ) from error


def check_repeatable(
    model: nn.Module, names: Sequence[str], probe: tuple[Any, ...], expected: Any
) -> None:
    """Raise ModelError where another call of the model gives something else than `expected`."""
    try:
        check_equivalent(expected, outputs_of(model, names, probe), name="a second call")
    except VerificationError as error:
        raise ModelError(
            f"{type(model).__name__} gives other outputs when it is called again with the same "
            "inputs: take random numbers and counters of calls out of forward"
        ) from error


def difference(
    model: nn.Module, names: Sequence[str], graph: fx.GraphModule, values: Sequence[Any]
) -> str:
    """What `graph` computes otherwise than `model` on `values`; "" where it is the same."""
    # The model may write into its inputs.
    positional, named = arguments(model, names, copy.deepcopy(values))
    with torch.no_grad():
        expected = model(*positional, **named)
        try:
            # As every pass runs it: lists in a node's arguments cannot be written into.
            found = run_and_annotate(graph, copy.deepcopy(values), name="the graph")
        except VerificationError as error:
            return f"its graph does not run: {error}"
    try:
        check_equivalent(expected, found, name="the graph")
    except VerificationError as error:
        return f"its graph computes something else: {error}"
    return ""


def _one(batch: Sequence[Any]) -> tuple[Any, ...]:
    """The first sample of a batch."""
    return tuple(
        value[:1].contiguous() if isinstance(value, Tensor) and value.dim() else value
        for value in batch
    )
