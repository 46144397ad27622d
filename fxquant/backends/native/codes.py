"""Between floats and codes, and from codes to codes by a table."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.elementwise import (
    codes_fields,
    image_fields,
    image_loops,
    plain,
    size_fields,
)
from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import type_number
from fxquant.backends.native.values import Loops, Value
from fxquant.integer.rounding import float32_scalar

__all__ = ["lower_dequantize", "lower_lookup", "lower_quantize"]


def lower_quantize(planner: Planner, node: fx.Node) -> Value:
    """Floats of any strides to codes; the caller's NCHW becomes an image."""
    if node in planner.ready:
        return planner.ready[node]
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    if x.dtype != torch.float32:
        raise UnsupportedError(node, f"it quantizes {x.dtype}")
    y = planner.allocate(x)
    inverse = float(float32_scalar(1.0) / float32_scalar(arguments["scale"]))
    fields = {"inverse": inverse, **codes_fields(arguments)}
    work = 0.5 * math.prod(y.shape)
    found = planar = None
    if y.dtype == torch.uint8 and y.tensor.numel():
        found = image_loops(planner, y.shape, [y.strides, x.strides])
        scattered = found is None or found.strides[1][3] not in (0, 1)
        if found is None or scattered or found.sizes[3] == 1:
            planar = _planar(y, x)
            found = planar or (None if scattered else found)
    if found is not None:
        y_strides, x_strides = found.strides
        fields |= image_fields("y", y, y_strides) | size_fields(planner, found)
        fields |= {
            "x": planner.at(x),
            "x_batch": x_strides[0],
            "x_row": x_strides[1],
            "x_column": x_strides[2],
            "x_channel": x_strides[3],
            "fill_channels": found.sizes[3],
        }
        image = y.buffer.image
        if planar is not None and image is not None and image.stride(3) == 4:
            fields["fill_channels"] = 4
        planner.emit("quantize", fields, (x,), (y,), work)
        return y
    return plain(planner, "plain_quantize", {"x": x}, y, fields | {"y_type": type_number(y.dtype)})


def _planar(y: Value, x: Value) -> Loops | None:
    """An image whose channels are innermost, from floats that lie in any other order."""
    if y.tensor.dim() != 4 or y.strides[1] != 1:
        return None
    order = (0, 2, 3, 1)
    return Loops(
        [y.shape[d] for d in order],
        [[value.strides[d] for d in order] for value in (y, x)],
    )


def lower_dequantize(planner: Planner, node: fx.Node) -> Value:
    """Codes to floats, written where and how they are read."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["q"])
    y = planner.allocate(x)
    fields: dict[str, Any] = {
        "scale": float(float32_scalar(arguments["scale"])),
        "x_zero_point": arguments["zero_point"],
    }
    loops = None
    if x.dtype == torch.uint8 and y.tensor.numel():
        loops = image_loops(planner, x.shape, [x.strides, y.strides])
    if loops is None:
        fields["x_type"] = type_number(x.dtype)
        return plain(planner, "plain_dequantize", {"x": x}, y, fields)
    x_strides, y_strides = loops.strides
    fields |= image_fields("x", x, x_strides) | size_fields(planner, loops)
    fields |= {
        "y": planner.at(y),
        "y_batch": y_strides[0],
        "y_row": y_strides[1],
        "y_column": y_strides[2],
        "y_channel": y_strides[3],
    }
    planner.emit("dequantize", fields, (x,), (y,), 0.5 * math.prod(y.shape))
    return y


def lower_lookup(planner: Planner, node: fx.Node) -> Value:
    """A table; nothing where the kernel in front of it has looked up already."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    if planner.is_done(node):
        return x
    return _lookup(planner, x, planner.tensor(arguments["table"]), planner.allocate(x))


def _lookup(planner: Planner, x: Value, table: Tensor, y: Value) -> Value:
    fields: dict[str, Any] = {"table": planner.data(table)}
    loops = image_loops(planner, y.shape, [y.strides, x.strides]) if y.tensor.numel() else None
    if loops is None or loops.strides[1][-1] not in (0, 1):
        spread = planner.loops(y.shape, y.strides, x.strides)
        if spread is None:
            raise UnsupportedError(planner.current, "a tensor of too many dimensions")
        fields |= {
            "x": planner.at(x),
            "y": planner.at(y),
            "shape": spread[0],
            "y_strides": spread[1],
            "x_strides": spread[2],
            "samples": planner.samples(y),
        }
        planner.emit("plain_lookup", fields, (x,), (y,), 2.0 * math.prod(y.shape))
        return y
    fields |= image_fields("y", y, loops.strides[0]) | image_fields("x", x, loops.strides[1])
    fields |= size_fields(planner, loops)
    planner.emit("lookup", fields, (x,), (y,), 0.2 * math.prod(y.shape))
    return y
