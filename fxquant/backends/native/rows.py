"""Softmax, GELU, layer norm and division by the norm on integers: plain kernels along rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import Pointer, type_number
from fxquant.backends.native.values import Loops, Value
from fxquant.integer.bounds import input_range
from fxquant.integer.softmax import shift_exp

__all__ = ["lower_norm", "lower_shift_gelu", "lower_softmax_codes"]

OPS: Any = torch.ops.fxquant
_NORMS: dict[Any, int] = {
    OPS.layer_norm_integer.default: 0,
    OPS.layer_norm_i_vit.default: 1,
    OPS.layer_norm_power_of_two.default: 2,
    OPS.normalize_integer.default: 3,
}


def lower_softmax_codes(planner: Planner, node: fx.Node) -> Value:
    """`softmax_table`, `softmax_i_vit` and `softmax_log2`; their exponentials are a table."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    y = planner.dense(planner.shapes[node])
    distances = torch.arange(65536 if x.dtype == torch.int16 else 256)
    fields: dict[str, Any] = {"x_type": type_number(x.dtype), "y_type": type_number(y.dtype)}
    if node.target is OPS.softmax_table.default:
        table = planner.tensor(arguments["table"]).to(torch.int64)
        fields |= {
            "kind": 0,
            "numerator": arguments["numerator"],
            "lo": arguments["qmin"],
            "hi": arguments["qmax"],
        }
    elif node.target is OPS.softmax_i_vit.default:
        table = shift_exp(distances, arguments["x0"], arguments["n"])
        fields |= {"kind": 1, "bits": arguments["bits"]}
    else:
        table = _log_exponentials(arguments, distances)
        bits = arguments["bits"]
        powers = [min(2 ** (15 - exponent), 32767) for exponent in range(2**bits)]
        fields |= {"kind": 2, "bits": bits, "powers": planner.numbers([*powers, 0])}
    fields["table"] = planner.data(table)
    operands = {"x": x}
    if arguments["mask"] is not None:
        mask = planner.value(arguments["mask"])
        operands["mask"] = Value(mask.tensor.expand(x.shape), mask.buffer)
    fields |= _along(planner, -1, {**operands, "y": y})
    fields.setdefault("mask_strides", fields["x_strides"])
    planner.emit("plain_softmax", fields, list(operands.values()), (y,), 8.0 * math.prod(y.shape))
    return y


def _log_exponentials(arguments: dict[str, Any], distances: Tensor) -> Tensor:
    """FQ-ViT's polynomial of each distance, as `log_int_softmax` defines it."""
    x0, n = arguments["x0"], arguments["n"]
    z = (-distances).clamp(min=n * x0)
    q = torch.div(z, x0, rounding_mode="floor")
    r = z - q * x0
    exponentials: Tensor = (r * (r + arguments["b"]) + arguments["c"]).clamp(min=0) << (n - q)
    return exponentials


def lower_shift_gelu(planner: Planner, node: fx.Node) -> Value:
    """`gelu_i_vit`; a row is the last dimension."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    y = planner.dense(planner.shapes[node])
    low, high = input_range(x.dtype, arguments["x_zero_point"])
    table = shift_exp(torch.arange(high - low + 1), arguments["x0"], arguments["n"])
    fields = {
        "table": planner.data(table),
        "bits": arguments["bits"],
        "x_type": type_number(x.dtype),
        "y_type": type_number(y.dtype),
        "x_zero_point": arguments["x_zero_point"],
        **_along(planner, -1, {"x": x, "y": y}),
    }
    planner.emit("plain_shift_gelu", fields, (x,), (y,), 8.0 * math.prod(y.shape))
    return y


def lower_norm(planner: Planner, node: fx.Node) -> Value:
    """The layer norms over the last dimensions, and `normalize_integer` along one."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    result = y = planner.dense(planner.shapes[node])
    axis = arguments.get("dim", -1)
    bias: Pointer | None = None
    if node.target is not OPS.normalize_integer.default:
        dims = arguments["dims"]
        if arguments["bias"] is not None:
            bias = planner.data(planner.tensor(arguments["bias"]).reshape(-1))
        if dims > 1:
            # A row of several dimensions: they must lie one behind the other.
            dense = planner.dense(x.tensor)
            planner.copy(x, dense)
            rank = len(x.shape)
            x, y = (Value(v.tensor.flatten(rank - dims), v.buffer) for v in (dense, y))
    fields: dict[str, Any] = {
        "bias": bias,
        "kind": _NORMS[node.target],
        "x_type": type_number(x.dtype),
        "y_type": type_number(y.dtype),
        "x_zero_point": arguments["x_zero_point"],
        **_along(planner, axis, {"x": x, "y": y}),
    }
    if node.target is OPS.layer_norm_power_of_two.default:
        shift = planner.tensor(arguments["channel_shift"])
        fields["shifts"] = planner.data(shift.repeat(x.shape[-1] // shift.numel()))
    planner.emit("plain_norm", fields, (x,), (y,), 8.0 * math.prod(y.shape))
    return result


def _along(planner: Planner, axis: int, values: dict[str, Value]) -> dict[str, Any]:
    """Addresses, shape and strides with the row innermost; the last value is the output."""
    shape = values["y"].shape
    axis %= len(shape)
    if planner.batched and axis == 0:
        raise UnsupportedError(planner.current, "its rows hold samples")
    rest = [d for d in range(len(shape)) if d != axis]
    order = ["y", *(name for name in values if name != "y")]
    strides = [[values[name].strides[d] for d in rest] for name in order]
    loops = Loops.of([shape[d] for d in rest], strides, planner.batched)
    if not planner.batched:
        loops = Loops([1, *loops.sizes], [[0, *row] for row in loops.strides])
    if len(loops.sizes) > 5:
        raise UnsupportedError(planner.current, "a tensor of too many dimensions")
    # Work is split over dimension 1: loops of size 1 fill the dimensions behind it.
    fill = 5 - len(loops.sizes)
    sizes = [*loops.sizes[:2], *([1] * fill), *loops.sizes[2:], shape[axis]]
    fields: dict[str, Any] = {
        "shape": planner.numbers(sizes),
        "samples": planner.samples(values["y"]),
    }
    for name, row in zip(order, loops.strides, strict=True):
        spread = [*row[:2], *([0] * fill), *row[2:], values[name].strides[axis]]
        fields[name] = planner.at(values[name])
        fields[f"{name}_strides"] = planner.numbers(spread)
    return fields
