"""What stays float: layers, products, norms and pools of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from fxquant.export.onnx.movement import argument
from fxquant.export.onnx.pools import max_pool, window_pads
from fxquant.export.onnx.writer import Writer
from passes import scaled_matmul, weighted_mean

__all__ = ["FLOAT_LAYERS"]

Emit = Callable[[Writer, fx.Node], Any]


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
    if include and any(
        behind > pad for behind, pad in zip(pads[-len(padding) :], padding, strict=True)
    ):
        raise w.refusal("its last window sticks out of the padding")
    return w.op(
        "AveragePool",
        w.value(source),
        kernel_shape=kernel,
        strides=stride,
        pads=pads,
        count_include_pad=int(include),
    )


def _embedding(w: Writer, node: fx.Node) -> ir.Value:
    return w.op("Gather", w.value(node.args[1]), w.value(node.args[0]))


FLOAT_LAYERS: dict[Any, Emit] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.linear: _linear,
    **{getattr(F, f"conv{n}d"): _convolution("Conv", n) for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): _convolution("ConvTranspose", n) for n in (1, 2, 3)},
    **dict.fromkeys((torch.matmul, scaled_matmul), _matmul),
    weighted_mean: _weighted_mean,
    **{getattr(F, f"adaptive_avg_pool{n}d"): _adaptive_average for n in (1, 2, 3)},
    **{getattr(F, f"max_pool{n}d"): _max_pool for n in (1, 2, 3)},
    **{getattr(F, f"avg_pool{n}d"): _average_pool for n in (1, 2, 3)},
    F.embedding: _embedding,
}
"""Functions of torch on float tensors."""
