"""The ranges of activation functions."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import fx

from passes.ranges import intervals
from passes.ranges.arithmetic import add
from passes.ranges.intervals import UNBOUNDED, Interval
from passes.ranges.operands import Rule, kept, name_of, operand, range_of

__all__ = ["clamp", "elu", "gated", "leaky_relu", "relu", "relu_of_sum", "tanh"]


def gated(minimum: float) -> Rule:
    """``x·g(x)`` with g in [0, 1], whose least value is `minimum`."""

    def rule(node: fx.Node) -> Interval:
        x = operand(node)
        if x.non_negative:
            return Interval(0.0, x.high, intervals.because(name_of(node), x))
        return Interval(minimum, max(0.0, x.high), f"{name_of(node)} ≥ {minimum:g}")

    return rule


def relu(node: fx.Node) -> Interval:
    """Never below zero."""
    return Interval(0.0, max(0.0, operand(node).high), "relu")


def relu_of_sum(node: fx.Node) -> Interval:
    """`relu` behind an addition."""
    return Interval(0.0, max(0.0, add(node).high), "relu")


def clamp(node: fx.Node) -> Interval:
    """Between the bounds, where they are known."""
    names = ("min_val", "max_val") if node.target is F.hardtanh else ("min", "max")
    bounds = [node.kwargs.get(name) for name in names]
    x = operand(node)
    low, high = x.low, x.high
    if bounds[0] is not None:
        at_least = range_of(bounds[0])
        low, high = max(low, at_least.low), max(high, at_least.high)
    if bounds[1] is not None:
        # The upper bound wins where the two cross.
        at_most = range_of(bounds[1])
        low, high = min(low, at_most.low), min(high, at_most.high)
    return intervals.interval(low, high, f"{name_of(node)} ⊂ {Interval(low, high)}")


def leaky_relu(node: fx.Node) -> Interval:
    """Its negative side is that of the operand times the slope."""
    x, slope = operand(node), node.kwargs.get("negative_slope", 0.01)
    if x.non_negative or not isinstance(slope, (int, float)) or slope < 0:
        return kept(node) if x.non_negative else UNBOUNDED
    low = x.low * slope if slope else 0.0
    return intervals.interval(low, max(0.0, x.high), intervals.because("leaky_relu", x))


def elu(node: fx.Node) -> Interval:
    """Never below ``-alpha``."""
    x, alpha = operand(node), node.kwargs.get("alpha", 1.0)
    if x.non_negative or not isinstance(alpha, (int, float)) or alpha < 0:
        return kept(node) if x.non_negative else UNBOUNDED
    return Interval(-float(alpha), max(0.0, x.high), f"{name_of(node)} ≥ {-alpha:g}")


def tanh(node: fx.Node) -> Interval:
    """Between the tangents of the bounds."""
    x = operand(node)
    proof = intervals.because("tanh", x) if x.non_negative else "tanh ⊂ [-1, 1]"
    return Interval(math.tanh(x.low), math.tanh(x.high), proof)
