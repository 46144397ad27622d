"""``"auto"``: the target that is fastest on this machine, measured when a model is compiled."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxquant.backends.checked import Lowered, lower_checked
from fxquant.backends.target import Target
from fxquant.backends.targets import AUTO, TARGETS, find_target
from fxquant.errors import CompileError, TargetError
from fxquant.frontend.inputs import arguments
from fxquant.frontend.structure import Names
from fxquant.timing import in_turns

__all__ = ["AUTO", "candidates", "compare_with_float", "lower_fastest"]

_FAST = ("native", "x86")  # the first one's demands on weights hold for a choice
_TURNS, _CALLS = 6, 3


def candidates(name: str) -> tuple[Target, ...]:
    """The targets that a name stands for: itself, or for "auto" the fast ones of this machine.

    Raises TargetError for a name that is unknown, or whose target is not available here.
    """
    if name != AUTO:
        return (find_target(name),)
    found = tuple(TARGETS[fast] for fast in _FAST if not TARGETS[fast].unavailable())
    if not found:
        reasons = "; ".join(f"{fast}: {TARGETS[fast].unavailable()}" for fast in _FAST)
        raise TargetError(f'no fast target is available here ({reasons}); take "reference"')
    return found


def lower_fastest(
    integer: fx.GraphModule, name: str, example: Sequence[Any]
) -> tuple[Target, Lowered, tuple[str, ...]]:
    """Lower to every candidate of a name; the fastest on `example`, and why it was chosen.

    A candidate that fails is named with its error, as long as another one does not.
    """
    lowered: dict[str, Lowered] = {}
    failures: dict[str, str] = {}
    targets = candidates(name)
    for target in targets:
        try:
            lowered[target.name] = lower_checked(integer, target, example)
        except (CompileError, TargetError) as error:
            if target is targets[-1] and not lowered:
                raise
            failures[target.name] = str(error)
    if name != AUTO:
        return targets[0], lowered[name], ()
    runs = {target: found.run for target, found in lowered.items()}
    medians = _medians(runs, example) if len(runs) > 1 else dict.fromkeys(runs, 0.0)
    best = min(medians, key=medians.__getitem__)
    notes = [
        f"auto: {best} runs, in {medians[best] / medians[other]:.2f} of {other}'s time here "
        f"({_circumstances(example)})"
        for other in medians
        if other != best
    ]
    notes += [f"auto: not {failed}: {why}" for failed, why in failures.items()]
    notes += [f"auto: not {fast}: {why}" for fast in _FAST if (why := TARGETS[fast].unavailable())]
    return TARGETS[best], lowered[best], tuple(notes)


def compare_with_float(
    run: Callable[..., Any], model: nn.Module, example: Sequence[Any], names: Sequence[str]
) -> tuple[float, str]:
    """The time of `run` over that of the float model, channels-last, and the circumstances.

    `names` are the inputs' and what they are parts of.
    """
    floats: Callable[..., Any] = copy.deepcopy(model).to(memory_format=torch.channels_last)
    if isinstance(names, Names):
        positional, named = arguments(model, names, example)
        floats = partial(_with, floats, positional, named)
    medians = _medians({"quantized": run, "float": floats}, example)
    return medians["quantized"] / medians["float"], _circumstances(example)


def _with(
    model: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any], *_: Any
) -> Any:
    return model(*positional, **named)


def _medians(runs: dict[str, Callable[..., Any]], example: Sequence[Any]) -> dict[str, float]:
    with torch.inference_mode():
        times = in_turns(runs, example, range(_TURNS), _CALLS)
    return {name: statistics.median(found) for name, found in times.items()}


def _circumstances(example: Sequence[Any]) -> str:
    shapes = [list(x.shape) for x in example if isinstance(x, torch.Tensor)]
    threads = torch.get_num_threads()
    return f"inputs {', '.join(map(str, shapes))}, {threads} thread{'s' * (threads != 1)}"
