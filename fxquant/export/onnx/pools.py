"""Maxima and averages.

An exact average is the exact sum times one multiplier: a depthwise convolution with ones, or
ReduceSum over whole dimensions. A runtime's own average rounds elsewhere at ties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.export.onnx.codes import centered, dequantized, to_codes
from fxquant.export.onnx.writer import Writer
from fxquant.integer.bounds import FLOAT32_LIMIT, largest_operand
from fxquant.integer.pooling import window_lengths

__all__ = [
    "emit_adaptive_avg_pool",
    "emit_avg_pool",
    "emit_max_pool",
    "emit_mean",
    "emit_sum_accumulate",
    "max_pool",
    "window_pads",
]


def window_pads(
    sizes: Sequence[int],
    outputs: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The padding before and behind each dimension with which exactly these windows fit.

    torch's ``ceil_mode`` drops a window that would start behind the input; ONNX need not.
    """
    behind = [
        max((number - 1) * hop + step * (size - 1) + 1 - length - pad, 0)
        for length, number, size, hop, pad, step in zip(
            sizes, outputs, kernel, stride, padding, dilation, strict=True
        )
    ]
    return [*padding, *behind]


def max_pool(
    w: Writer,
    x: ir.Value,
    node: fx.Node,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> ir.Value:
    """MaxPool with the windows of `node`."""
    spatial = len(kernel)
    if len(sizes) != spatial + 2:
        raise w.refusal("its input has no batch")
    pads = window_pads(sizes[2:], w.sizes(node)[2:], kernel, stride or kernel, padding, dilation)
    return w.op(
        "MaxPool",
        x,
        kernel_shape=list(kernel),
        strides=list(stride or kernel),
        pads=pads,
        dilations=list(dilation),
    )


def emit_max_pool(w: Writer, node: fx.Node) -> ir.Value:
    """MaxPool on the codes; 16-bit ones as floats, which hold them."""
    a = w.arguments
    x, dtype = w.value(a["x"]), w.shapes[a["x"]].dtype
    window = a["kernel_size"], a["stride"], a["padding"], a["dilation"]
    sizes = w.sizes(a["x"])
    if dtype == torch.int16:
        return w.cast(max_pool(w, w.cast(x, torch.float32), node, sizes, *window), dtype)
    return max_pool(w, x, node, sizes, *window)


def emit_avg_pool(w: Writer, node: fx.Node) -> ir.Value:
    """A depthwise convolution with ones, then ``s_x / (s_y · count)`` for each position."""
    a = w.arguments
    sizes, outputs = w.sizes(a["x"]), w.sizes(node)
    kernel, padding = list(a["kernel_size"]), list(a["padding"])
    stride = list(a["stride"]) or kernel
    spatial = len(kernel)
    if len(sizes) != spatial + 2:
        raise w.refusal("its input has no batch")
    pads = window_pads(sizes[2:], outputs[2:], kernel, stride, padding, [1] * spatial)
    count = torch.ones((), dtype=torch.float64)
    for axis in range(spatial):
        lengths = window_lengths(
            sizes[2 + axis],
            outputs[2 + axis],
            kernel[axis],
            stride[axis],
            padding[axis],
            a["count_include_pad"],
        )
        count = count.unsqueeze(-1) * torch.tensor(lengths, dtype=torch.float64)
    if a["divisor_override"] is not None:
        count = torch.full_like(count, a["divisor_override"])
    if not w.options.exact and bool((count == math.prod(kernel)).all()) and not any(pads):
        return _plain(w, "AveragePool", {"kernel_shape": kernel, "strides": stride})
    x = _exact(w, math.prod(kernel))
    channels = sizes[1]
    ones = torch.ones((channels, 1, *kernel), dtype=torch.int8)
    scale = w.scalar(1.0, torch.float32)
    weight = w.op("DequantizeLinear", w.constant(ones, f"ones_{channels}"), scale)
    sums = w.op("Conv", x, weight, strides=stride, pads=pads, group=channels)
    return _divided(w, sums, count)


def emit_adaptive_avg_pool(w: Writer, node: fx.Node) -> ir.Value:
    """Products with matrices of zeros and ones; ReduceSum where a dimension becomes one value."""
    a = w.arguments
    sizes, outputs = w.sizes(a["x"]), list(a["output_size"])
    spatial = len(outputs)
    if set(outputs) == {1}:
        axes = list(range(len(sizes) - spatial, len(sizes)))
        if not w.options.exact and len(sizes) == spatial + 2:
            return _plain(w, "GlobalAveragePool", {})
        return _over(w, axes, True, math.prod(sizes[-spatial:]))
    real = _exact(w, math.prod(sizes[-spatial:]))
    count = torch.ones((), dtype=torch.float64)
    for axis, number in enumerate(outputs):
        length, position = sizes[axis - spatial], len(sizes) - spatial + axis
        matrix = _membership(length, number)
        count = count.unsqueeze(-1) * matrix.sum(0).double()
        order = [d for d in range(len(sizes)) if d != position] + [position]
        real = w.op("Transpose", real, perm=order)
        real = w.op("MatMul", real, w.constant(matrix, f"windows_{length}_{number}"))
        real = w.op("Transpose", real, perm=[order.index(d) for d in range(len(sizes))])
    return _divided(w, real, count)


def _membership(length: int, outputs: int) -> Tensor:
    """f32[length, outputs]: 1 where a position is in the window, as torch divides."""
    matrix = torch.zeros(length, outputs)
    for index in range(outputs):
        matrix[index * length // outputs : -((index + 1) * length // -outputs), index] = 1
    return matrix


def emit_mean(w: Writer, node: fx.Node) -> ir.Value:
    """ReduceSum and one product; ReduceMean between DQ and Q where that is enough."""
    a = w.arguments
    sizes, grows = w.sizes(a["x"]), w.shapes[a["x"]].batched
    axes = sorted(d % len(sizes) for d in (a["dim"] or range(len(sizes))))
    if any(grows[axis] for axis in axes):
        raise w.refusal("it takes the mean over the batch")
    if not w.options.exact:
        return _plain(w, "ReduceMean", {"keepdims": int(a["keepdim"])}, w.numbers(*axes))
    return _over(w, axes, a["keepdim"], math.prod(sizes[axis] for axis in axes))


def emit_sum_accumulate(w: Writer, node: fx.Node) -> ir.Value:
    """ReduceSum of int64."""
    a = w.arguments
    sizes = w.sizes(a["x"])
    axes = sorted(d % len(sizes) for d in (a["dim"] or range(len(sizes))))
    x = centered(w, w.value(a["x"]), a["x_zero_point"], torch.int64)
    return w.op("ReduceSum", x, w.numbers(*axes), keepdims=int(a["keepdim"]))


def _over(w: Writer, axes: Sequence[int], keep: bool, number: int) -> ir.Value:
    a = w.arguments
    axes_value, keepdims = w.numbers(*axes), int(keep)
    largest = largest_operand(w.shapes[a["x"]].dtype, a["x_zero_point"])
    if number * largest < FLOAT32_LIMIT:
        sums = w.op("ReduceSum", _exact(w, number), axes_value, keepdims=keepdims)
    else:
        wide = centered(w, w.value(a["x"]), a["x_zero_point"], torch.int64)
        sums = w.cast(w.op("ReduceSum", wide, axes_value, keepdims=keepdims), torch.float32)
    return _divided(w, sums, torch.tensor(float(number), dtype=torch.float64))


def _exact(w: Writer, number: int) -> ir.Value:
    """``q − z`` as floats, of which so many have an exact sum."""
    a = w.arguments
    dtype = w.shapes[a["x"]].dtype
    if number * largest_operand(dtype, a["x_zero_point"]) >= FLOAT32_LIMIT:
        raise w.refusal(f"a sum of {number} values leaves what float32 holds exactly")
    return dequantized(w, w.value(a["x"]), 1.0, a["x_zero_point"], dtype)


def _divided(w: Writer, sums: ir.Value, count: Tensor) -> ir.Value:
    a = w.arguments
    factor = (a["x_scale"] / (count * a["scale"])).float()
    if factor.numel() > 1 and bool((factor == factor.flatten()[0]).all()):
        factor = factor.flatten()[0]
    real = w.op("Mul", sums, w.constant(factor, "float32_average"))
    return to_codes(w, real, a["zero_point"], a["qmin"], a["qmax"], a["dtype"])


def _plain(w: Writer, kind: str, attributes: Mapping[str, Any], *more: ir.Value) -> ir.Value:
    """The operator between DQ and Q."""
    a = w.arguments
    dtype = w.shapes[a["x"]].dtype
    real = dequantized(w, w.value(a["x"]), a["x_scale"], a["x_zero_point"], dtype)
    real = w.op(kind, real, *more, **attributes)
    output = a["zero_point"], a["qmin"], a["qmax"], a["dtype"]
    return to_codes(w, real, *output, a["scale"])
