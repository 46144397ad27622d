"""What stays float: operations of torch between a dequantize and a quantize, or at the ends."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from fxquant.export.onnx.movement import argument
from fxquant.export.onnx.pools import max_pool, window_pads
from fxquant.export.onnx.writer import Writer
from passes import add_relu, masked_softmax, scaled_matmul, softmax_numerators, weighted_mean

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


def _layer_norm(w: Writer, node: fx.Node) -> ir.Value:
    shape = argument(node, 1, "normalized_shape")
    weight = argument(node, 2, "weight", default=None)
    bias = argument(node, 3, "bias", default=None)
    scale = w.constant(torch.ones(list(shape)), "ones") if weight is None else w.value(weight)
    return w.op(
        "LayerNormalization",
        w.value(node.args[0]),
        scale,
        *(() if bias is None else (w.value(bias),)),
        axis=-len(shape),
        epsilon=float(argument(node, 4, "eps", default=1e-5)),
    )


def _batch_norm(w: Writer, node: fx.Node) -> ir.Value:
    if node.kwargs.get("training"):
        raise w.refusal("it normalizes with the statistics of the batch")
    mean, variance = w.tensor(node.args[1]).double(), w.tensor(node.args[2]).double()
    weight, bias = (
        argument(node, 3, "weight", default=None),
        argument(node, 4, "bias", default=None),
    )
    factor = (variance + argument(node, 7, "eps", default=1e-5)).rsqrt()
    factor = factor if weight is None else factor * w.tensor(weight).double()
    offset = -mean * factor
    offset = offset if bias is None else offset + w.tensor(bias).double()
    shape = [-1] + [1] * (len(w.sizes(node)) - 2)
    factors = w.constant(factor.float().reshape(shape), f"{node.name}_factor")
    offsets = w.constant(offset.float().reshape(shape), f"{node.name}_offset")
    return w.op("Add", w.op("Mul", w.value(node.args[0]), factors), offsets)


def _linear(w: Writer, node: fx.Node) -> ir.Value:
    x, weight = w.value(node.args[0]), w.value(argument(node, 1, "weight"))
    bias = argument(node, 2, "bias", default=None)
    y = w.op("MatMul", x, w.op("Transpose", weight, perm=[1, 0]))
    return y if bias is None else w.op("Add", y, w.value(bias))


def _convolution(kind: str, dimensions: int) -> Emit:
    def emit(w: Writer, node: fx.Node) -> ir.Value:
        transposed = kind == "ConvTranspose"

        def each(index: int, name: str, default: int) -> list[int]:
            value = argument(node, index, name, default=default)
            return list(value) if isinstance(value, (tuple, list)) else [value] * dimensions

        bias = argument(node, 2, "bias", default=None)
        operands = [w.value(node.args[0]), w.value(argument(node, 1, "weight"))]
        operands += [] if bias is None else [w.value(bias)]
        padding = argument(node, 4, "padding", default=0)
        if isinstance(padding, str):
            raise w.refusal(f"its padding is {padding!r}")
        places = {"group": 6, "dilation": 7} if transposed else {"dilation": 5, "group": 6}
        options: dict[str, Any] = {
            "strides": each(3, "stride", 1),
            "pads": each(4, "padding", 0) * 2,
            "dilations": each(places["dilation"], "dilation", 1),
            "group": argument(node, places["group"], "groups", default=1),
        }
        if transposed:
            options["output_padding"] = each(5, "output_padding", 0)
        return w.op(kind, *operands, **options)

    return emit


def _matmul(w: Writer, node: fx.Node) -> ir.Value:
    result = w.op("MatMul", w.value(node.args[0]), w.value(node.args[1]))
    if node.target is scaled_matmul:
        result = w.op("Mul", result, w.scalar(float(node.kwargs["scale"]), torch.float32))  # type: ignore[arg-type]
    return result


def _weighted_mean(w: Writer, node: fx.Node) -> ir.Value:
    weights, values = w.value(node.args[0]), w.value(node.args[1])
    total = w.op("ReduceSum", weights, w.numbers(-1), keepdims=1)
    none = w.op("Equal", total, w.scalar(0.0, torch.float32))
    total = w.op("Where", none, w.scalar(1.0, torch.float32), total)
    return w.op("Div", w.op("MatMul", weights, values), total)


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


def _adaptive_average(w: Writer, node: fx.Node) -> ir.Value:
    size = argument(node, 1, "output_size")
    source: Any = node.args[0]
    wanted = size if isinstance(size, (tuple, list)) else [size]
    dimensions = len(w.sizes(source)) - 2
    if all(value == 1 for value in wanted):
        axes = w.numbers(*range(2, 2 + dimensions))
        return w.op("ReduceMean", w.value(source), axes, keepdims=1)
    before, after = w.sizes(source)[2:], w.sizes(node)[2:]
    if any(a % b for a, b in zip(before, after, strict=True)):
        raise w.refusal("its float windows have several sizes")
    kernel = [a // b for a, b in zip(before, after, strict=True)]
    return w.op("AveragePool", w.value(source), kernel_shape=kernel, strides=kernel)


def _pool(node: fx.Node, dimensions: int) -> tuple[list[int], list[int], list[int]]:
    def each(value: Any) -> list[int]:
        return list(value) if isinstance(value, (tuple, list)) else [value] * dimensions

    kernel = each(argument(node, 1, "kernel_size"))
    stride = argument(node, 2, "stride", default=None)
    return kernel, each(stride) if stride else kernel, each(argument(node, 3, "padding", default=0))


def _max_pool(w: Writer, node: fx.Node) -> ir.Value:
    source: Any = node.args[0]
    sizes = w.sizes(source)
    dilation = argument(node, 4, "dilation", default=1)
    spatial = len(sizes) - 2
    steps = list(dilation) if isinstance(dilation, (tuple, list)) else [dilation] * spatial
    return max_pool(w, w.value(source), node, sizes, *_pool(node, spatial), steps)


def _average_pool(w: Writer, node: fx.Node) -> ir.Value:
    source: Any = node.args[0]
    sizes = w.sizes(source)
    kernel, stride, padding = _pool(node, len(sizes) - 2)
    if argument(node, 6, "divisor_override", default=None) is not None:
        raise w.refusal("it has a divisor of its own")
    ones = [1] * len(kernel)
    pads = window_pads(sizes[2:], w.sizes(node)[2:], kernel, stride, padding, ones)
    include = argument(node, 5, "count_include_pad", default=True)
    if include and pads != padding * 2:
        raise w.refusal("its last window sticks out of the padding")
    return w.op(
        "AveragePool",
        w.value(source),
        kernel_shape=kernel,
        strides=stride,
        pads=pads,
        count_include_pad=int(include),
    )


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


def _embedding(w: Writer, node: fx.Node) -> ir.Value:
    return w.op("Gather", w.value(node.args[1]), w.value(node.args[0]))


def _cast(dtype: torch.dtype) -> Emit:
    return lambda w, node: w.cast(w.value(node.args[0]), dtype)


FLOATS: dict[Any, Emit] = {
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
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.linear: _linear,
    **{getattr(F, f"conv{n}d"): _convolution("Conv", n) for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): _convolution("ConvTranspose", n) for n in (1, 2, 3)},
    **dict.fromkeys((torch.matmul, scaled_matmul), _matmul),
    weighted_mean: _weighted_mean,
    torch.mean: _reduce("ReduceMean"),
    torch.sum: _reduce("ReduceSum"),
    torch.amax: _reduce("ReduceMax"),
    **{getattr(F, f"adaptive_avg_pool{n}d"): _adaptive_average for n in (1, 2, 3)},
    **{getattr(F, f"max_pool{n}d"): _max_pool for n in (1, 2, 3)},
    **{getattr(F, f"avg_pool{n}d"): _average_pool for n in (1, 2, 3)},
    F.normalize: _normalize,
    torch.masked_fill: _masked_fill,
    F.prelu: _prelu,
    F.embedding: _embedding,
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
