"""One arena for all values of a program, planned by how long each of them lives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fxquant.backends.native.values import Buffer

__all__ = ["Arena", "Lifetime", "place"]

_ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer's bytes a sample, and the first and the last step that touch it."""

    buffer: Buffer
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """Bytes a sample: the arena's, and what all values together would take."""

    size: int
    total: int


def place(lifetimes: Iterable[Lifetime]) -> Arena:
    """Give every buffer its offset: the largest first, each at the lowest place that is free.

    Source: the greedy-by-size strategy of Pisarchyk and Lee, Efficient Memory Management for Deep
    Neural Net Inference, 2020.
    """
    placed: list[tuple[Lifetime, int, int]] = []
    total = 0
    for life in sorted(lifetimes, key=lambda life: (-life.size, life.first)):
        size = -(-life.size // _ALIGNMENT) * _ALIGNMENT
        total += size
        taken = sorted(
            (start, end)
            for other, start, end in placed
            if other.first <= life.last and life.first <= other.last
        )
        at = 0
        for start, end in taken:
            if at + size <= start:
                break
            at = max(at, end)
        life.buffer.offset = at
        placed.append((life, at, at + size))
    return Arena(max((end for _, _, end in placed), default=0), total)
