"""Linear layers on the kernel of convolutions: a row of features is a pixel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.layer import (
    FLOATS,
    GELU,
    Layer,
    by_panels,
    image_fields,
    may_be_fast,
    output_fields,
    residual_value,
)
from fxquant.backends.native.packing import pack_conv, pad_outputs
from fxquant.backends.native.patterns import gelu_behind
from fxquant.backends.native.planner import Planner
from fxquant.backends.native.values import Loops, Value
from fxquant.integer.rounding import float32_scalar
from fxquant.kernels.calls import operator_arguments

__all__ = ["lower_linear"]


def lower_linear(planner: Planner, layer: Layer, x: Value) -> Value | None:
    """The kernel of convolutions over rows of features; None where it does not fit."""
    halves = layer.halves()
    if halves is None or not may_be_fast(planner, layer, x):
        return None
    if x.shape[-1] > 1 and x.strides[-1] != 1:
        dense = planner.dense(x.tensor)
        planner.copy(x, dense)
        x = dense
    behind = gelu_behind(planner.current) if layer.kind == FLOATS else None
    if behind is None:
        y = planner.allocate()
    else:
        with planner.standing_for(behind[1]):
            y = planner.allocate(planner.dense(planner.shapes[behind[1]]))
    residual = residual_value(planner, layer)
    if y.strides[-1] != 1 and y.shape[-1] > 1:
        return None
    values = [y, x] if residual is None else [y, x, residual]
    if residual is not None and residual.shape[-1] > 1 and residual.strides[-1] != 1:
        return None
    loops = Loops.of(y.shape[:-1], [value.strides[:-1] for value in values], planner.batched)
    padded = loops.padded(3, planner.batched)
    if padded is None:
        return None
    if planner.batched and len(y.shape) == 1:
        return None
    outputs, inputs = layer.weight.shape
    quads = -(-inputs // 4)
    weights = torch.cat([pack_conv(half[:, :, None, None]) for half in halves], 2)
    sizes, strides = padded.sizes, padded.strides
    size = y.dtype.itemsize
    fields = {
        **(output_fields(planner, layer) if behind is None else _gelu_fields(behind[1])),
        "x": planner.at(x),
        "segment_offset": planner.numbers([0] * len(halves), torch.int32),
        "weight": planner.data(weights),
        "bias": planner.data(pad_outputs(layer.start())),
        "multiplier": planner.data(pad_outputs(layer.multiplier)),
        "y": planner.at(y),
        **image_fields("x", strides[1]),
        **image_fields("y", [stride * size for stride in strides[0]]),
        "batch": planner.count(sizes[0]) if planner.batched else sizes[0],
        "height": sizes[1],
        "width": sizes[2],
        "groups": 1,
        "outputs": outputs,
        "segments": len(halves),
        "segment_quads": quads,
        "kind": layer.kind if behind is None else GELU,
    }
    if planner.batched and _is_one_row(padded):
        # Tokens of all samples side by side: tiles need not end with a sample.
        fields |= {"batch": 1, "height": 1, "width": planner.count(math.prod(sizes))}
    fields["x_column"] = fields.pop("x_pixel")
    reads = [x]
    if residual is not None:
        fields |= {"residual": planner.at(residual), **image_fields("residual", strides[2])}
        reads.append(residual)
    rows = math.prod(sizes) / (planner.batch or 1)
    fields["by_panels"] = by_panels(weights, rows * inputs)
    work = rows * outputs * inputs / 200 + rows * outputs / 10
    planner.emit("conv", fields, reads, (y,), work * (planner.batch or 1))
    if behind is not None:
        planner.absorbed[behind[0]] = planner.current
        planner.ready[behind[1]] = y
    return y


def _gelu_fields(quantize: fx.Node) -> dict[str, Any]:
    arguments = operator_arguments(quantize)
    return {
        "inverse": float(float32_scalar(1.0) / float32_scalar(arguments["scale"])),
        "zero_point": arguments["zero_point"],
        "lo": arguments["qmin"],
        "hi": arguments["qmax"],
    }


def _is_one_row(loops: Loops) -> bool:
    """Whether the rows of all samples lie at equal distances in every tensor."""
    batch, height, width = loops.sizes
    return (
        all(
            (height == 1 or row[1] == width * row[2]) and row[0] == height * width * row[2]
            for row in loops.strides
        )
        and batch > 1
    )
