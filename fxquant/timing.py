"""Callables timed in turns, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["in_turns"]


def in_turns(
    candidates: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    turns: Iterable[int],
    calls: int,
) -> dict[str, list[float]]:
    """The milliseconds of every measured call of each candidate.

    In every turn each candidate makes one call that warms its weights up in the caches after the
    others have used them, then `calls` measured ones. The order rotates with the turn's number.
    """
    names = list(candidates)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in turns:
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            function = candidates[name]
            function(*arguments)
            for _ in range(calls):
                begin = time.perf_counter_ns()
                function(*arguments)
                milliseconds[name].append((time.perf_counter_ns() - begin) / 1e6)
    return milliseconds
