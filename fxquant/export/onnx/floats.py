"""What stays float: functions of torch between a dequantize and a quantize, or at the ends."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from fxquant.export.onnx.float_layers import FLOAT_LAYERS
from fxquant.export.onnx.movement import argument
from fxquant.export.onnx.writer import Writer
from passes import add_relu, masked_softmax, softmax_numerators

__all__ = ["FLOATS", "SINGLE_OPERATIONS"]

Emit = Callable[[Writer, fx.Node], Any]


def _operand(w: Writer, value: Any, dtype: torch.dtype = torch.float32) -> ir.Value:
    """A tensor, or a number as a constant."""
    if isinstance(value, (int, float)):
        return w.scalar(value, dtype)
    return w.value(value)


def _unary(kind: str, **attributes: Any) -> Emit:
    def emit(w: Writer, node: fx.Node) -> ir.Value:
        return w.op(kind, w.value(node.args[0]), **attributes)

    return emit


def _pair(kind: str) -> Emit:
    def emit(w: Writer, node: fx.Node) -> ir.Value:
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            raise w.refusal(f"its alpha is {alpha}")
        dtype = w.shapes[node].dtype
        left = _operand(w, argument(node, 0, "input"), dtype)
        right = _operand(w, argument(node, 1, "other", "exponent"), dtype)
        return w.op(kind, left, right)

    return emit


def _add_relu(w: Writer, node: fx.Node) -> ir.Value:
    return w.op("Relu", _pair("Add")(w, node))


def _gelu(w: Writer, node: fx.Node) -> ir.Value:
    approximate = node.kwargs.get("approximate", "none")
    return w.op("Gelu", w.value(node.args[0]), approximate=approximate)


def _silu(w: Writer, node: fx.Node) -> ir.Value:
    x = w.value(node.args[0])
    return w.op("Mul", x, w.op("Sigmoid", x))


def _hard_sigmoid(w: Writer, node: fx.Node) -> ir.Value:
    return w.op("HardSigmoid", w.value(node.args[0]), alpha=1 / 6, beta=0.5)


def _clamp(low: Any = None, high: Any = None) -> Emit:
    def emit(w: Writer, node: fx.Node) -> ir.Value:
        least = argument(node, 1, "min", "min_val", default=-1.0 if low is None else low)
        most = argument(node, 2, "max", "max_val", default=1.0 if high is None else high)
        bounds = [None if v is None else w.scalar(float(v), torch.float32) for v in (least, most)]
        return w.op("Clip", w.value(node.args[0]), *bounds)

    return emit


def _clamp_open(w: Writer, node: fx.Node) -> ir.Value:
    least, most = argument(node, 1, "min", default=None), argument(node, 2, "max", default=None)
    bounds = [None if v is None else w.scalar(float(v), torch.float32) for v in (least, most)]
    return w.op("Clip", w.value(node.args[0]), *bounds)


def _leaky(w: Writer, node: fx.Node) -> ir.Value:
    slope = argument(node, 1, "negative_slope", default=0.01)
    return w.op("LeakyRelu", w.value(node.args[0]), alpha=float(slope))


def _softmax(w: Writer, node: fx.Node) -> ir.Value:
    axis = argument(node, 1, "dim")
    return w.op("Softmax", w.value(node.args[0]), axis=axis)


def _numerators(w: Writer, node: fx.Node) -> ir.Value:
    x, mask = w.value(node.args[0]), argument(node, 1, "mask", default=None)
    least = w.scalar(torch.finfo(torch.float32).min, torch.float32)
    if mask is not None:
        x = w.op("Where", w.value(mask), x, least)
    top = w.op("ReduceMax", x, w.numbers(-1), keepdims=1)
    result = w.op("Exp", w.op("Sub", x, top))
    if mask is not None:
        result = w.op("Where", w.value(mask), result, w.scalar(0.0, torch.float32))
    return result


def _masked_softmax(w: Writer, node: fx.Node) -> ir.Value:
    x, mask, axis = (
        w.value(node.args[0]),
        w.value(node.args[1]),
        argument(node, 2, "dim", default=-1),
    )
    least = w.scalar(torch.finfo(torch.float32).min, torch.float32)
    shares = w.op("Softmax", w.op("Where", mask, x, least), axis=axis)
    return w.op("Where", mask, shares, w.scalar(0.0, torch.float32))


def _reduce(kind: str) -> Emit:
    def emit(w: Writer, node: fx.Node) -> ir.Value:
        source: Any = node.args[0]
        dims = argument(node, 1, "dim", default=None)
        rank = len(w.sizes(source))
        dims = range(rank) if dims is None else dims if isinstance(dims, (tuple, list)) else [dims]
        keep = int(argument(node, 2, "keepdim", default=False))
        axes = w.numbers(*(int(d) % rank for d in dims))
        return w.op(kind, w.value(source), axes, keepdims=keep)

    return emit


def _normalize(w: Writer, node: fx.Node) -> ir.Value:
    if argument(node, 1, "p", default=2.0) != 2:
        raise w.refusal("it divides by another norm than the 2-norm")
    x = w.value(node.args[0])
    axes = w.numbers(int(argument(node, 2, "dim", default=1)))
    norm = w.op("ReduceL2", x, axes, keepdims=1)
    least = w.scalar(float(argument(node, 3, "eps", default=1e-12)), torch.float32)
    return w.op("Div", x, w.op("Max", norm, least))


def _masked_fill(w: Writer, node: fx.Node) -> ir.Value:
    value = float(argument(node, 2, "value"))
    return w.op(
        "Where", w.value(node.args[1]), w.scalar(value, torch.float32), w.value(node.args[0])
    )


def _prelu(w: Writer, node: fx.Node) -> ir.Value:
    slope = w.tensor(argument(node, 1, "weight"))
    shape = [-1] + [1] * (len(w.sizes(node)) - 2)
    value = w.constant(slope.reshape(shape), f"{node.name}_slope")
    return w.op("PRelu", w.value(node.args[0]), value)


def _cast(dtype: torch.dtype) -> Emit:
    return lambda w, node: w.cast(w.value(node.args[0]), dtype)


FLOATS: dict[Any, Emit] = {
    **FLOAT_LAYERS,
    **dict.fromkeys((torch.relu, F.relu), _unary("Relu")),
    F.relu6: _clamp(0.0, 6.0),
    F.hardtanh: _clamp(),
    torch.clamp: _clamp_open,
    **dict.fromkeys((torch.sigmoid, F.sigmoid), _unary("Sigmoid")),
    **dict.fromkeys((torch.tanh, F.tanh), _unary("Tanh")),
    F.gelu: _gelu,
    F.silu: _silu,
    F.hardswish: _unary("HardSwish"),
    F.hardsigmoid: _hard_sigmoid,
    F.leaky_relu: _leaky,
    F.softplus: _unary("Softplus"),
    F.mish: _unary("Mish"),
    torch.exp: _unary("Exp"),
    torch.log: _unary("Log"),
    torch.sqrt: _unary("Sqrt"),
    torch.abs: _unary("Abs"),
    torch.neg: _unary("Neg"),
    **dict.fromkeys((torch.add, operator.add), _pair("Add")),
    **dict.fromkeys((torch.sub, operator.sub), _pair("Sub")),
    **dict.fromkeys((torch.mul, operator.mul), _pair("Mul")),
    **dict.fromkeys((torch.div, operator.truediv), _pair("Div")),
    torch.pow: _pair("Pow"),
    **dict.fromkeys((torch.maximum,), _pair("Max")),
    **dict.fromkeys((torch.minimum,), _pair("Min")),
    add_relu: _add_relu,
    **dict.fromkeys((F.softmax, torch.softmax), _softmax),
    softmax_numerators: _numerators,
    masked_softmax: _masked_softmax,
    torch.mean: _reduce("ReduceMean"),
    torch.sum: _reduce("ReduceSum"),
    torch.amax: _reduce("ReduceMax"),
    F.normalize: _normalize,
    torch.masked_fill: _masked_fill,
    F.prelu: _prelu,
    "float": _cast(torch.float32),
    torch.logical_not: _unary("Not"),
}
"""Functions of torch on float tensors."""

SINGLE_OPERATIONS = frozenset(
    {
        torch.relu, F.relu, F.relu6, F.hardtanh, torch.clamp, torch.abs, torch.neg,
        torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, add_relu,
        operator.add, operator.sub, operator.mul, operator.truediv,
        F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.amax, torch.masked_fill, "float",
    }
)  # fmt: skip
"""Those that IEEE 754 rounds once, or not at all: the same bits everywhere."""
