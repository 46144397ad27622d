"""Convolutions over images whose channels are innermost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.layer import (
    SUMS,
    Layer,
    by_panels,
    image_fields,
    may_be_fast,
    output_fields,
    residual_value,
)
from fxquant.backends.native.packing import pack_conv, pack_depthwise, pack_lanes, pad_outputs
from fxquant.backends.native.planner import Planner
from fxquant.backends.native.steps import Pointer
from fxquant.backends.native.values import Border, Value

__all__ = ["lower_convolution"]


def _as_image(value: Value) -> Value:
    return Value(value.tensor.unsqueeze(2), value.buffer) if value.tensor.dim() == 3 else value


def _four(values: Any) -> list[int]:
    """Hyper-parameters of a convolution of two dimensions."""
    return [int(v) for v in values]


def lower_convolution(planner: Planner, layer: Layer, x: Value) -> Value | None:
    """Depthwise or in groups, over images or lines; None where no fast kernel fits."""
    halves = layer.halves()
    if halves is None or not may_be_fast(planner, layer, x):
        return None
    is_line = layer.weight.dim() == 3
    arguments = layer.arguments
    stride, padding, dilation = (_four(arguments[key]) for key in ("stride", "padding", "dilation"))
    if is_line:
        x = _as_image(x)
        halves = [half.unsqueeze(2) for half in halves]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    x = _with_border(planner, x, Border(*padding), layer.zero_point)
    result = planner.allocate()
    y = _as_image(result)
    residual = residual_value(planner, layer)
    if residual is not None:
        residual = _as_image(residual)
        if residual.shape[1] > 1 and residual.strides[1] != 1:
            moved = planner.bordered(residual.shape, residual.dtype, Border(), 0)
            planner.copy(residual, moved)
            residual = moved
    if y.shape[1] > 1 and y.strides[1] != 1:
        return None
    batch, _, row, pixel = x.strides
    start = planner.at(x)
    start = Pointer(start.buffer, start.offset - padding[0] * row - padding[1] * pixel)
    size = y.dtype.itemsize
    fields: dict[str, Any] = {
        **output_fields(planner, layer),
        "x": start,
        "y": planner.at(y),
        **image_fields("y", [size * y.strides[d] for d in (0, 2, 3)]),
        "x_batch": batch,
        "batch": planner.count(y.shape[0]),
        "height": y.shape[2],
        "width": y.shape[3],
    }
    reads = [x]
    if residual is not None:
        fields |= {
            "residual": planner.at(residual),
            **image_fields("residual", [residual.strides[d] for d in (0, 2, 3)]),
        }
        reads.append(residual)
    groups, outputs = int(arguments["groups"]), layer.weight.shape[0]
    kernel = halves[0].shape[2:]
    is_depthwise = (
        groups == outputs == x.shape[1]
        and groups > 1
        and len(halves) == 1
        and dilation == [1, 1]
        and max(kernel) <= 7
        and layer.kind != SUMS
    )
    per_sample = math.prod(y.shape) / y.shape[0] * (y.shape[0] / (planner.batch or 1))
    if is_depthwise:
        fields |= {
            "x_row": row,
            "x_pixel": pixel,
            "weight": planner.data(pack_depthwise(halves[0])),
            "bias": planner.data(pack_lanes(layer.start())),
            "multiplier": planner.data(pack_lanes(layer.multiplier)),
            "channels": groups,
            "kernel_height": kernel[0],
            "kernel_width": kernel[1],
            "stride_height": stride[0],
            "stride_width": stride[1],
            "kind": layer.kind,
        }
        work = per_sample * math.prod(kernel) / 40 + per_sample / 10
        planner.emit("depthwise_conv", fields, reads, (y,), work * (planner.batch or 1))
        return result
    segments, quads, weights = _segments(halves, groups, x, dilation)
    fields |= {
        "x_row": stride[0] * row,
        "x_column": stride[1] * pixel,
        "x_group": x.shape[1] // groups,
        "segment_offset": planner.numbers(segments, torch.int32),
        "weight": planner.data(weights),
        "bias": planner.data(pad_outputs(layer.start(), groups)),
        "multiplier": planner.data(pad_outputs(layer.multiplier, groups)),
        "groups": groups,
        "outputs": outputs // groups,
        "segments": len(segments),
        "segment_quads": quads,
        "kind": layer.kind,
    }
    fields["by_panels"] = by_panels(weights, math.prod(x.shape[1:]))
    work = per_sample * layer.weight[0].numel() / 200 + per_sample / 10
    planner.emit("conv", fields, reads, (y,), work * (planner.batch or 1))
    return result


def _segments(
    halves: list[Tensor], groups: int, x: Value, dilation: list[int]
) -> tuple[list[int], int, Tensor]:
    """Where the runs of bytes under a window begin, their length in quads, and the weight."""
    channels = halves[0].shape[1]
    height, width = halves[0].shape[2:]
    _, _, row, pixel = x.strides
    dense = pixel == channels or (pixel == 4 and channels < 4 and x.buffer.image is not None)
    by_rows = groups == 1 and dilation[1] == 1 and pixel % 4 == 0 and dense
    if by_rows:
        segments = [ky * dilation[0] * row for ky in range(height)]
        quads = width * pixel // 4
    else:
        segments = [
            ky * dilation[0] * row + kx * dilation[1] * pixel
            for ky in range(height)
            for kx in range(width)
        ]
        quads = -(-channels // 4)
    packed = [pack_conv(half, groups, pixel if by_rows else None) for half in halves]
    return segments * len(halves), quads, torch.cat(packed, 2)


def _with_border(planner: Planner, x: Value, border: Border, zero: int) -> Value:
    """`x`, or a copy of it, with its channels innermost and a border that holds `zero`."""
    channels_inside = x.shape[1] == 1 or x.strides[1] == 1
    if channels_inside and (not border or _has_border(x, border, zero)):
        return x
    moved = planner.bordered(x.shape, x.dtype, border, zero)
    planner.copy(x, moved)
    return moved


def _has_border(x: Value, border: Border, zero: int) -> bool:
    buffer = x.buffer
    image = buffer.image
    if image is None or buffer.filled != zero:
        return False
    same = x.shape[2:] == tuple(image.shape[2:]) and x.strides[2:] == tuple(image.stride())[2:]
    # A slice of channels begins in the image's first pixel.
    first = x.tensor.storage_offset() - image.storage_offset()
    inside = 0 <= first < image.stride(3)
    return bool(same and inside and border | buffer.border == buffer.border)
