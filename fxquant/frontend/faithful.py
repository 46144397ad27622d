"""Does the float graph compute what the model computes? On one sample, beside the model itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import ModelError, TraceError
from fxquant.frontend.inputs import arguments
from passes import VerificationError
from passes.infra.verify import check_equivalent

__all__ = ["check_repeatable", "check_same_outputs", "one_sample"]


def one_sample(traced: fx.GraphModule, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """One sample of `batch`, because passes are verified on it again and again.

    The whole batch where the model does not run on that: the first dimension of a recurrent
    layer's state is no batch.
    """
    one = tuple(
        value[:1].contiguous() if isinstance(value, Tensor) and value.dim() else value
        for value in batch
    )
    try:
        with torch.no_grad():
            traced(*one)
    except Exception:
        return batch
    return one


def check_repeatable(model: nn.Module, names: Sequence[str], probe: tuple[Any, ...]) -> None:
    """Raise ModelError where a second call with the same inputs gives something else."""
    outputs = []
    for _ in range(2):
        positional, named = arguments(model, names, copy.deepcopy(probe))
        try:
            with torch.no_grad():
                outputs.append(copy.deepcopy(model(*positional, **named)))
        except Exception:
            return  # the run of the graph says at which operation
    try:
        check_equivalent(*outputs, name="a second call")
    except VerificationError as error:
        raise ModelError(
            f"{type(model).__name__} gives other outputs when it is called again with the same "
            "inputs: take random numbers and counters of calls out of forward"
        ) from error


def check_same_outputs(
    model: nn.Module, names: Sequence[str], graph: fx.GraphModule, probe: tuple[Any, ...]
) -> None:
    """Raise TraceError where the graph computes something else than the model."""
    # The model may write into its inputs.
    positional, named = arguments(model, names, copy.deepcopy(probe))
    with torch.no_grad():
        expected, found = model(*positional, **named), graph(*copy.deepcopy(probe))
    try:
        check_equivalent(expected, found, name="the float graph")
    except VerificationError as error:
        raise TraceError(
            f"{type(model).__name__} computes something else than what was traced of it: {error}; "
            "does forward depend on random numbers, or on what it was called with before?"
        ) from error
