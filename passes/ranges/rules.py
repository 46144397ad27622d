"""What each operation says about the range of its result: the table behind InferRanges."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from passes.attention.functions import masked_softmax, softmax_numerators
from passes.layers.fused_layer import add_relu
from passes.ranges import intervals
from passes.ranges.intervals import UNBOUNDED, Interval

__all__ = ["RULES", "range_of"]

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


def _name(node: fx.Node) -> str:
    return str(node.target if isinstance(node.target, str) else node.target.__name__).strip("_")


def _operand(node: fx.Node, index: int = 0) -> Interval:
    return range_of(node.args[index]) if len(node.args) > index else UNBOUNDED


def _kept(node: fx.Node) -> Interval:
    """Moves, repeats, selects or averages elements of its operand."""
    return intervals.hull(_name(node), _operand(node))


def _taken(node: fx.Node) -> Interval:
    # What is taken from a value has the story of that value; "getitem" would not add to it.
    return _operand(node)


def _joined(node: fx.Node) -> Interval:
    parts = node.args[0]
    if not isinstance(parts, (tuple, list)) or not parts:
        return UNBOUNDED
    return intervals.hull(_name(node), *map(range_of, parts))


def _within(low: float, high: float) -> Rule:
    return lambda node: Interval(low, high, f"{_name(node)} ⊂ [{low:g}, {high:g}]")


def _at_least(low: float) -> Rule:
    return lambda node: Interval(low, math.inf, f"{_name(node)} ≥ {low:g}")


def _gated(minimum: float) -> Rule:
    """``x·g(x)`` with g in [0, 1], whose least value is `minimum`."""

    def rule(node: fx.Node) -> Interval:
        x = _operand(node)
        if x.non_negative:
            return Interval(0.0, x.high, intervals.because(_name(node), x))
        return Interval(minimum, max(0.0, x.high), f"{_name(node)} ≥ {minimum:g}")

    return rule


# -- activations ----------------------------------------------------------------------------


def _relu(node: fx.Node) -> Interval:
    return Interval(0.0, max(0.0, _operand(node).high), "relu")


def _add_relu(node: fx.Node) -> Interval:
    return Interval(0.0, max(0.0, _add(node).high), "relu")


def _clamp(node: fx.Node) -> Interval:
    names = ("min_val", "max_val") if node.target is F.hardtanh else ("min", "max")
    bounds = [node.kwargs.get(name) for name in names]
    x = _operand(node)
    low, high = x.low, x.high
    if bounds[0] is not None:
        at_least = range_of(bounds[0])
        low, high = max(low, at_least.low), max(high, at_least.high)
    if bounds[1] is not None:
        # The upper bound wins where the two cross.
        at_most = range_of(bounds[1])
        low, high = min(low, at_most.low), min(high, at_most.high)
    return intervals.interval(low, high, f"{_name(node)} ⊂ {Interval(low, high)}")


def _leaky_relu(node: fx.Node) -> Interval:
    x, slope = _operand(node), node.kwargs.get("negative_slope", 0.01)
    if x.non_negative or not isinstance(slope, (int, float)) or slope < 0:
        return _kept(node) if x.non_negative else UNBOUNDED
    low = x.low * slope if slope else 0.0
    return intervals.interval(low, max(0.0, x.high), intervals.because("leaky_relu", x))


def _elu(node: fx.Node) -> Interval:
    x, alpha = _operand(node), node.kwargs.get("alpha", 1.0)
    if x.non_negative or not isinstance(alpha, (int, float)) or alpha < 0:
        return _kept(node) if x.non_negative else UNBOUNDED
    return Interval(-float(alpha), max(0.0, x.high), f"{_name(node)} ≥ {-alpha:g}")


def _tanh(node: fx.Node) -> Interval:
    x = _operand(node)
    proof = intervals.because("tanh", x) if x.non_negative else "tanh ⊂ [-1, 1]"
    return Interval(math.tanh(x.low), math.tanh(x.high), proof)


# -- arithmetic -----------------------------------------------------------------------------


def _second(node: fx.Node) -> Interval:
    other = range_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("other"))
    alpha = node.kwargs.get("alpha", 1)
    return other if alpha == 1 else intervals.multiply(range_of(alpha), other)


def _add(node: fx.Node) -> Interval:
    return intervals.add(_operand(node), _second(node))


def _subtract(node: fx.Node) -> Interval:
    a, b = _operand(node), _second(node)
    proof = intervals.because("difference", a, b)
    return intervals.interval(a.low - b.high, a.high - b.low, proof)


def _multiply(node: fx.Node) -> Interval:
    if len(node.args) > 1 and node.args[0] is node.args[1]:
        return _square(node)
    return intervals.multiply(_operand(node), _second(node))


def _divide(node: fx.Node) -> Interval:
    if node.kwargs.get("rounding_mode") is not None:
        return UNBOUNDED
    return intervals.divide(_operand(node), _second(node))


def _matmul(node: fx.Node) -> Interval:
    a, b = _operand(node), _second(node)
    if a.non_negative and b.non_negative:
        return Interval(0.0, math.inf, "product of non-negatives")
    return UNBOUNDED


def _sum(node: fx.Node) -> Interval:
    if _operand(node).non_negative:
        return Interval(0.0, math.inf, "sum of non-negatives")
    return UNBOUNDED


def _negative(node: fx.Node) -> Interval:
    x = _operand(node)
    return intervals.interval(-x.high, -x.low, intervals.because("negative", x))


def _absolute(node: fx.Node) -> Interval:
    x = _operand(node)
    return Interval(max(0.0, x.low, -x.high), max(-x.low, x.high), "abs")


def _square(node: fx.Node) -> Interval:
    x = _operand(node)
    largest = max(-x.low, x.high)
    return Interval(0.0, largest * largest, "square")


def _power(node: fx.Node) -> Interval:
    exponent = node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent")
    if exponent == 2:
        return _square(node)
    if isinstance(exponent, (int, float)) and exponent % 2 == 0:
        return Interval(0.0, math.inf, "even power")
    x = _operand(node)
    if x.non_negative:
        return Interval(0.0, math.inf, intervals.because("power", x))
    return UNBOUNDED


def _maximum(node: fx.Node) -> Interval:
    a, b = _operand(node), _second(node)
    proof = intervals.because("maximum", *(each for each in (a, b) if each.proof))
    return intervals.interval(max(a.low, b.low), max(a.high, b.high), proof)


def _minimum(node: fx.Node) -> Interval:
    a, b = _operand(node), _second(node)
    proof = intervals.because("minimum", *(each for each in (a, b) if each.proof))
    return intervals.interval(min(a.low, b.low), min(a.high, b.high), proof)


def _where(node: fx.Node) -> Interval:
    if len(node.args) != 3:
        return UNBOUNDED
    return intervals.hull("where", _operand(node, 1), _operand(node, 2))


# -- windows --------------------------------------------------------------------------------


def _max_pool(node: fx.Node) -> Interval:
    # Padding is −∞ here, and every window holds an element. With indices there are two results.
    return UNBOUNDED if node.kwargs.get("return_indices") else _kept(node)


def _avg_pool(node: fx.Node) -> Interval:
    x = _operand(node)
    if node.kwargs.get("divisor_override") is not None:
        return _sum(node)
    padding = node.kwargs.get("padding", 0)
    if padding in (0, (0,), (0, 0), (0, 0, 0)) and not node.kwargs.get("ceil_mode"):
        return _kept(node)
    # Padded windows average some zeros in.
    return intervals.interval(min(x.low, 0.0), max(x.high, 0.0), intervals.because(_name(node), x))


def _pad(node: fx.Node) -> Interval:
    x = _operand(node)
    if node.kwargs.get("mode", "constant") != "constant":
        return intervals.hull(f"{node.kwargs['mode']} padding", x)
    value = node.kwargs.get("value") or 0
    filled = range_of(value)
    name = "zero padding" if value == 0 else "padding"
    return intervals.interval(
        min(x.low, filled.low), max(x.high, filled.high), intervals.because(name, x)
    )


def _interpolate(node: fx.Node) -> Interval:
    # Cubic kernels have negative weights; all others average.
    return UNBOUNDED if node.kwargs.get("mode") == "bicubic" else _kept(node)


_KEEPING: tuple[Any, ...] = (
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.roll, torch.flip, torch.unflatten, torch.swapaxes, torch.movedim),
    *(F.channel_shuffle, F.pixel_shuffle, F.pixel_unshuffle, torch.tile, torch.clone),
    *(torch.mean, torch.amax, torch.amin, torch.index_select, torch.gather),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *("contiguous", "clone", "detach", "view", "reshape", "expand", "expand_as", "repeat"),
    *("permute", "transpose", "flatten", "squeeze", "unsqueeze", "unfold", "float", "to"),
)

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_KEEPING, _kept),
    **dict.fromkeys((operator.getitem, torch.chunk, torch.split, torch.unbind), _taken),
    **dict.fromkeys((torch.narrow, torch.select, torch.tensor_split), _taken),
    **dict.fromkeys((torch.cat, torch.stack), _joined),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), _max_pool),
    **dict.fromkeys(
        (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), _max_pool
    ),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _avg_pool),
    F.pad: _pad,
    F.interpolate: _interpolate,
    torch.where: _where,
    # Activations; the minima are rounded away from zero.
    F.relu: _relu,
    add_relu: _add_relu,
    F.relu6: _within(0, 6),
    **dict.fromkeys((F.hardtanh, torch.clamp), _clamp),
    **dict.fromkeys((torch.sigmoid, F.hardsigmoid, F.softmax, torch.softmax), _within(0, 1)),
    masked_softmax: _within(0, 1),
    softmax_numerators: _within(0, 1),
    torch.tanh: _tanh,
    F.hardswish: _gated(-0.375),
    F.silu: _gated(-0.2785),
    F.gelu: _gated(-0.1701),
    F.mish: _gated(-0.3089),
    F.leaky_relu: _leaky_relu,
    **dict.fromkeys((F.elu, F.celu), _elu),
    **dict.fromkeys((F.softplus, torch.exp, torch.sqrt, torch.rsqrt), _at_least(0)),
    **dict.fromkeys((torch.var, torch.std, torch.norm, torch.linalg.vector_norm), _at_least(0)),
    # Arithmetic.
    torch.add: _add,
    torch.sub: _subtract,
    torch.mul: _multiply,
    torch.div: _divide,
    torch.neg: _negative,
    torch.abs: _absolute,
    torch.square: _square,
    torch.pow: _power,
    torch.maximum: _maximum,
    torch.minimum: _minimum,
    torch.sum: _sum,
    **dict.fromkeys((torch.matmul, torch.bmm), _matmul),
}
