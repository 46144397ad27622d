"""The ranges of pooling, padding and resizing."""

from __future__ import annotations

from torch import fx

from passes.ranges import intervals
from passes.ranges.arithmetic import total
from passes.ranges.intervals import UNBOUNDED, Interval
from passes.ranges.operands import kept, name_of, operand, range_of

__all__ = ["avg_pool", "interpolate", "max_pool", "pad"]


def max_pool(node: fx.Node) -> Interval:
    """The range of its operand."""
    # Padding is −∞ here, and every window holds an element. With indices there are two results.
    return UNBOUNDED if node.kwargs.get("return_indices") else kept(node)


def avg_pool(node: fx.Node) -> Interval:
    """The range of its operand, and zero where padding is averaged in."""
    x = operand(node)
    if node.kwargs.get("divisor_override") is not None:
        return total(node)
    padding = node.kwargs.get("padding", 0)
    if padding in (0, (0,), (0, 0), (0, 0, 0)) and not node.kwargs.get("ceil_mode"):
        return kept(node)
    # Padded windows average some zeros in.
    return intervals.interval(
        min(x.low, 0.0), max(x.high, 0.0), intervals.because(name_of(node), x)
    )


def pad(node: fx.Node) -> Interval:
    """The range of its operand, and what fills the border."""
    x = operand(node)
    if node.kwargs.get("mode", "constant") != "constant":
        return intervals.hull(f"{node.kwargs['mode']} padding", x)
    value = node.kwargs.get("value") or 0
    filled = range_of(value)
    name = "zero padding" if value == 0 else "padding"
    return intervals.interval(
        min(x.low, filled.low), max(x.high, filled.high), intervals.because(name, x)
    )


def interpolate(node: fx.Node) -> Interval:
    """The range of its operand, where the kernel averages."""
    # Cubic kernels have negative weights; all others average.
    return UNBOUNDED if node.kwargs.get("mode") == "bicubic" else kept(node)
