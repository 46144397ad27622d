"""The ranges of arithmetic on two operands or one."""

from __future__ import annotations

import math

from torch import fx

from passes.ranges import intervals
from passes.ranges.intervals import UNBOUNDED, Interval
from passes.ranges.operands import operand, second

__all__ = [
    "absolute",
    "add",
    "divide",
    "matmul",
    "maximum",
    "minimum",
    "multiply",
    "negative",
    "power",
    "square",
    "subtract",
    "total",
    "where",
]


def add(node: fx.Node) -> Interval:
    """``a + alpha * b``."""
    return intervals.add(operand(node), second(node))


def subtract(node: fx.Node) -> Interval:
    """``a - alpha * b``."""
    a, b = operand(node), second(node)
    proof = intervals.because("difference", a, b)
    return intervals.interval(a.low - b.high, a.high - b.low, proof)


def multiply(node: fx.Node) -> Interval:
    """``a * b``; the product of a value with itself is a square."""
    if len(node.args) > 1 and node.args[0] is node.args[1]:
        return square(node)
    return intervals.multiply(operand(node), second(node))


def divide(node: fx.Node) -> Interval:
    """``a / b``; unbounded where it rounds."""
    if node.kwargs.get("rounding_mode") is not None:
        return UNBOUNDED
    return intervals.divide(operand(node), second(node))


def matmul(node: fx.Node) -> Interval:
    """Never below zero where no operand is."""
    a, b = operand(node), second(node)
    if a.non_negative and b.non_negative:
        return Interval(0.0, math.inf, "product of non-negatives")
    return UNBOUNDED


def total(node: fx.Node) -> Interval:
    """Never below zero where no element is."""
    if operand(node).non_negative:
        return Interval(0.0, math.inf, "sum of non-negatives")
    return UNBOUNDED


def negative(node: fx.Node) -> Interval:
    """``-x``."""
    x = operand(node)
    return intervals.interval(-x.high, -x.low, intervals.because("negative", x))


def absolute(node: fx.Node) -> Interval:
    """``|x|``."""
    x = operand(node)
    return Interval(max(0.0, x.low, -x.high), max(-x.low, x.high), "abs")


def square(node: fx.Node) -> Interval:
    """``x * x``."""
    x = operand(node)
    largest = max(-x.low, x.high)
    return Interval(0.0, largest * largest, "square")


def power(node: fx.Node) -> Interval:
    """``x ** n``: an even number of factors is never below zero."""
    exponent = node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent")
    if exponent == 2:
        return square(node)
    if isinstance(exponent, (int, float)) and exponent % 2 == 0:
        return Interval(0.0, math.inf, "even power")
    x = operand(node)
    if x.non_negative:
        return Interval(0.0, math.inf, intervals.because("power", x))
    return UNBOUNDED


def maximum(node: fx.Node) -> Interval:
    """The larger of two."""
    a, b = operand(node), second(node)
    proof = intervals.because("maximum", *(each for each in (a, b) if each.proof))
    return intervals.interval(max(a.low, b.low), max(a.high, b.high), proof)


def minimum(node: fx.Node) -> Interval:
    """The smaller of two."""
    a, b = operand(node), second(node)
    proof = intervals.because("minimum", *(each for each in (a, b) if each.proof))
    return intervals.interval(min(a.low, b.low), min(a.high, b.high), proof)


def where(node: fx.Node) -> Interval:
    """Either of two."""
    if len(node.args) != 3:
        return UNBOUNDED
    return intervals.hull("where", operand(node, 1), operand(node, 2))
