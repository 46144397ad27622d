"""Operators on each element by itself: fast kernels on bytes, else plain ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import Pointer, type_number
from fxquant.backends.native.values import Loops, Value
from fxquant.integer.rounding import float32_scalar, rescale_factor

__all__ = [
    "codes_fields",
    "image_fields",
    "image_loops",
    "lower_add_rescaled",
    "lower_channel_affine",
    "lower_pair",
    "lower_rescale",
    "optional",
    "plain",
    "size_fields",
]

OPS: Any = torch.ops.fxquant


def image_loops(
    planner: Planner, shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> Loops | None:
    """Strides as the fast kernels take them: batch, rows, pixels and channels side by side."""
    if planner.batched and not shape:
        return None
    loops = Loops.of(shape, strides, planner.batched).with_channels(planner.batched)
    padded = loops.padded(4, planner.batched)
    if padded is None or max(padded.sizes) >= 2**31:
        return None
    return padded


def size_fields(planner: Planner, loops: Loops) -> dict[str, Any]:
    """How often the fast kernels repeat."""
    batch, height, width, channels = loops.sizes
    return {
        "batch": planner.count(batch) if planner.batched else batch,
        "height": height,
        "width": width,
        "channels": channels,
    }


def image_fields(name: str, value: Value, strides: Sequence[int]) -> dict[str, Any]:
    """Where a value lies: its address, and the distances of samples, rows and pixels."""
    batch, row, pixel, _ = strides
    return {
        name: Planner.at(value),
        f"{name}_batch": batch,
        f"{name}_row": row,
        f"{name}_pixel": pixel,
    }


def codes_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """Zero point and bounds of the output."""
    return {
        "zero_point": arguments["zero_point"],
        "lo": arguments["qmin"],
        "hi": arguments["qmax"],
    }


def optional(planner: Planner, table: Tensor | None) -> Pointer | None:
    """The address of a table; None is a null pointer."""
    return None if table is None else planner.data(table)


def plain(
    planner: Planner,
    kernel: str,
    operands: dict[str, Value],
    y: Value,
    fields: dict[str, Any],
    channels: Sequence[int] | None = None,
) -> Value:
    """Emit a plain kernel over the shape of `y`; operands broadcast."""
    spread = {name: value.tensor.expand(y.shape) for name, value in operands.items()}
    strides = [list(tensor.stride()) for tensor in spread.values()]
    extra = [] if channels is None else [channels]
    loops = planner.loops(y.shape, y.strides, *strides, *extra)
    if loops is None:
        raise UnsupportedError(planner.current, "a tensor of too many dimensions")
    shape, y_strides, *rest = loops
    all_fields = {
        "y": planner.at(y),
        "shape": shape,
        "y_strides": y_strides,
        "samples": planner.samples(y),
        **fields,
    }
    for name, pointer in zip(operands, rest, strict=False):
        all_fields[name] = planner.at(operands[name])
        all_fields[f"{name}_strides"] = pointer
    if channels is not None:
        all_fields["c_strides"] = rest[-1]
    planner.emit(kernel, all_fields, list(operands.values()), (y,), 4.0 * math.prod(y.shape))
    return y


def _types(operands: dict[str, Value], y: Value) -> dict[str, int]:
    types = {f"{name}_type": type_number(value.dtype) for name, value in operands.items()}
    return types | {"y_type": type_number(y.dtype)}


# -- of two tensors ------------------------------------------------------------------------

_PAIRS = {
    OPS.add.default: 0,
    OPS.mul.default: 1,
    OPS.mul_accumulate.default: 2,
    OPS.add_rescaled.default: 3,
}


def lower_pair(planner: Planner, node: fx.Node) -> Value:
    """`add` or `mul`, broadcast as torch does."""
    arguments = planner.arguments(node)
    a, b = planner.value(arguments["a"]), planner.value(arguments["b"])
    if node.target is OPS.mul.default and math.prod(a.shape) < math.prod(b.shape):
        a, b = b, a
        arguments |= {"a_zero_point": arguments["b_zero_point"]}
        arguments["b_zero_point"] = planner.arguments(node)["a_zero_point"]
    y = planner.allocate(a if a.shape == planner.shapes[node].shape else b)
    fields = {
        "a_zero_point": arguments["a_zero_point"],
        "b_zero_point": arguments["b_zero_point"],
    }
    if node.target in (OPS.add.default, OPS.mul.default):
        fields |= codes_fields(arguments)
    if node.target is OPS.add.default:
        fields["a_multiplier"] = float(rescale_factor(arguments["a_scale"], arguments["scale"]))
        fields["b_multiplier"] = float(rescale_factor(arguments["b_scale"], arguments["scale"]))
        reach = 255 * (fields["a_multiplier"] + fields["b_multiplier"])
    elif node.target is OPS.mul.default:
        factor = arguments["a_scale"] * arguments["b_scale"] / arguments["scale"]
        fields["a_multiplier"] = float(float32_scalar(factor))
        reach = 65025 * fields["a_multiplier"]
    else:
        reach = math.inf
    fast = _fast_pair(planner, node, a, b, y, fields) if reach < 2**30 else None
    if fast is not None:
        return fast
    operands = {"a": a, "b": b}
    fields |= {"kind": _PAIRS[node.target], **_types(operands, y)}
    return plain(planner, "plain_pair", operands, y, fields)


def _fast_pair(
    planner: Planner, node: fx.Node, a: Value, b: Value, y: Value, fields: dict[str, Any]
) -> Value | None:
    if {a.dtype, b.dtype, y.dtype} != {torch.uint8} or not y.tensor.numel():
        return None
    strides = [y.strides, *(v.tensor.expand(y.shape).stride() for v in (a, b))]
    loops = image_loops(planner, y.shape, strides)
    if loops is None or any(row[-1] != 1 and loops.sizes[-1] > 1 for row in loops.strides):
        return None
    y_strides, a_strides, b_strides = loops.strides
    fields = fields | image_fields("y", y, y_strides) | size_fields(planner, loops)
    fields |= image_fields("a", a, a_strides) | image_fields("b", b, b_strides)
    fields["table"] = optional(planner, planner.table_behind())
    kernel = "add"
    if node.target is OPS.mul.default:
        kernel = "mul"
        fields["multiplier"] = fields.pop("a_multiplier")
    planner.emit(kernel, fields, (a, b), (y,), 0.3 * math.prod(y.shape))
    return y


def lower_add_rescaled(planner: Planner, node: fx.Node) -> Value:
    """A sum of two branches, each rescaled by integers."""
    arguments = planner.arguments(node)
    a, b = planner.value(arguments["a"]), planner.value(arguments["b"])
    y = planner.allocate(a if a.shape == planner.shapes[node].shape else b)
    operands = {"a": a, "b": b}
    fields = codes_fields(arguments) | _types(operands, y) | {"kind": _PAIRS[node.target]}
    for name in ("a", "b"):
        fields[f"{name}_zero_point"] = arguments[f"{name}_zero_point"]
        fields[f"{name}_factor"] = arguments[f"{name}_multiplier"]
        fields[f"{name}_shift"] = arguments[f"{name}_shift"]
    return plain(planner, "plain_pair", operands, y, fields)


# -- with numbers of each channel ----------------------------------------------------------


def lower_channel_affine(planner: Planner, node: fx.Node) -> Value:
    """A factor and a summand for each channel."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    y = planner.allocate(x)
    weight, bias = planner.tensor(arguments["weight"]), planner.tensor(arguments["bias"])
    scale = arguments["scale"]
    factors = (weight.double() * arguments["x_scale"] / scale).float()
    offsets = (bias.double() / scale).float()
    fields = codes_fields(arguments) | {
        "multiplier": planner.data(factors),
        "offset": planner.data(offsets),
        "x_zero_point": arguments["x_zero_point"],
    }
    channels = [0, 1, *([0] * (len(y.shape) - 2))]
    reach = float((factors.abs() * 255 + offsets.abs()).max()) if factors.numel() else 0.0
    if {x.dtype, y.dtype} == {torch.uint8} and y.tensor.numel() and reach < 2**30:
        loops = image_loops(planner, y.shape, [y.strides, x.strides, channels])
        if loops is not None and loops.strides[2] == [0, 0, 0, 1]:
            fields |= image_fields("y", y, loops.strides[0]) | image_fields(
                "x", x, loops.strides[1]
            )
            fields |= size_fields(planner, loops)
            fields["table"] = optional(planner, planner.table_behind())
            planner.emit("channel_affine", fields, (x,), (y,), 0.3 * math.prod(y.shape))
            return y
    fields |= _types({"x": x}, y)
    return plain(planner, "plain_channel_affine", {"x": x}, y, fields, channels)


def lower_rescale(planner: Planner, node: fx.Node) -> Value:
    """Accumulators back to codes, by integers."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    y = planner.allocate(x)
    multiplier, shift = planner.tensor(arguments["multiplier"]), planner.tensor(arguments["shift"])
    number = max(multiplier.numel(), shift.numel())
    channels = [0] * len(y.shape)
    if number > 1:
        channels[arguments["axis"]] = 1
    fields = (
        codes_fields(arguments)
        | _types({"x": x}, y)
        | {
            "x_zero_point": arguments["x_zero_point"],
            "multiplier": planner.data(multiplier.expand(number).contiguous()),
            "shift": planner.data(shift.expand(number).contiguous()),
        }
    )
    return plain(planner, "plain_rescale", {"x": x}, y, fields, channels)
