"""What rules ask of a call's operands, and the ranges that many operations share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from passes.ranges import intervals
from passes.ranges.intervals import UNBOUNDED, Interval

__all__ = [
    "Rule",
    "at_least",
    "joined",
    "kept",
    "name_of",
    "operand",
    "range_of",
    "second",
    "taken",
    "within",
]

Rule = Callable[[fx.Node], Interval]
"""From a call in canonical form, its operands already ranged, to the range of its result."""


def range_of(value: Any) -> Interval:
    """The range found for a node; the point itself for a number; unbounded for the rest."""
    if isinstance(value, fx.Node):
        found = value.meta.get("range")
        return found if isinstance(found, Interval) else UNBOUNDED
    if isinstance(value, (int, float)) and not math.isnan(value):
        return Interval(float(value), float(value), "constant")
    return UNBOUNDED


def name_of(node: fx.Node) -> str:
    """The name of what a node calls."""
    return str(node.target if isinstance(node.target, str) else node.target.__name__).strip("_")


def operand(node: fx.Node, index: int = 0) -> Interval:
    """The range of the operand at `index`."""
    return range_of(node.args[index]) if len(node.args) > index else UNBOUNDED


def second(node: fx.Node) -> Interval:
    """The range of the second operand, times `alpha`."""
    other = range_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("other"))
    alpha = node.kwargs.get("alpha", 1)
    return other if alpha == 1 else intervals.multiply(range_of(alpha), other)


def kept(node: fx.Node) -> Interval:
    """Moves, repeats, selects or averages elements of its operand."""
    return intervals.hull(name_of(node), operand(node))


def taken(node: fx.Node) -> Interval:
    """A part of its operand."""
    # What is taken from a value has the story of that value; "getitem" would not add to it.
    return operand(node)


def joined(node: fx.Node) -> Interval:
    """The parts of a list together."""
    parts = node.args[0]
    if not isinstance(parts, (tuple, list)) or not parts:
        return UNBOUNDED
    return intervals.hull(name_of(node), *map(range_of, parts))


def within(low: float, high: float) -> Rule:
    """Between two numbers, whatever the operand is."""
    return lambda node: Interval(low, high, f"{name_of(node)} ⊂ [{low:g}, {high:g}]")


def at_least(low: float) -> Rule:
    """Never below a number, whatever the operand is."""
    return lambda node: Interval(low, math.inf, f"{name_of(node)} ≥ {low:g}")
