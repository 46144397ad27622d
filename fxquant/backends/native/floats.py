"""Float islands between integer operators, with the quantizer that follows them in one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.values import Buffer, Loops, Value
from fxquant.integer.rounding import float32_scalar
from fxquant.kernels.calls import operator_arguments
from passes import softmax_numerators

__all__ = [
    "APPROXIMATED",
    "lower_float_function",
    "lower_float_pair",
    "lower_layer_norm",
    "lower_softmax",
]

OPS: Any = torch.ops.fxquant
_FUNCTIONS: dict[Any, int] = {F.relu: 1, torch.relu: 1, F.gelu: 2}
_PAIRS: dict[Any, int] = {torch.add: 0, torch.sub: 1, torch.mul: 2}
APPROXIMATED = (F.gelu, F.softmax, torch.softmax, softmax_numerators, F.layer_norm)
"""Whose last bits are not torch's; the others are single operations of IEEE 754."""


def lower_layer_norm(planner: Planner, node: fx.Node) -> Value:
    """Over the last dimension."""
    shape: Any = _argument(node, 1, "normalized_shape")
    if len(shape) != 1:
        raise UnsupportedError(node, "it normalizes several dimensions")
    x = _operand(planner, _argument(node, 0, "input"))
    fields: dict[str, Any] = {"epsilon": float(_argument(node, 4, "eps", 1e-5))}
    for index, name in ((2, "weight"), (3, "bias")):
        source = _argument(node, index, name, None)
        if source is not None:
            fields[name] = planner.data(planner.tensor(source))
    return _rows(planner, node, "layer_norm_rows", {"x": x}, fields, 4.0)


def lower_softmax(planner: Planner, node: fx.Node) -> Value:
    """Over the last dimension; its numerators alone where a weighted mean follows."""
    x = _operand(planner, _argument(node, 0, "input"))
    fields: dict[str, Any] = {"divide": 1}
    operands = {"x": x}
    if node.target is softmax_numerators:
        fields["divide"] = 0
        mask = _argument(node, 1, "mask", None)
        if mask is not None:
            value = planner.value(mask)
            operands["mask"] = Value(value.tensor.expand(x.shape), value.buffer)
            if operands["mask"].strides[-1] != 1:
                raise UnsupportedError(node, "its mask broadcasts along a row")
    else:
        dim: Any = _argument(node, 1, "dim")
        if dim % x.tensor.dim() != x.tensor.dim() - 1:
            raise UnsupportedError(node, "it is not along the last dimension")
    return _rows(planner, node, "softmax_rows", operands, fields, 6.0)


def lower_float_function(planner: Planner, node: fx.Node) -> Value:
    """One function of each element."""
    if node.kwargs.get("approximate", "none") != "none":
        raise UnsupportedError(node, "it is another form of GELU")
    x = _operand(planner, _argument(node, 0, "input"))
    fields = {"function": _FUNCTIONS[node.target]}
    return _rows(planner, node, "function_rows", {"x": x}, fields, 4.0)


def lower_float_pair(planner: Planner, node: fx.Node) -> Value:
    """A sum, difference or product; one operand may broadcast."""
    a, b = (planner.values[n] if isinstance(n, fx.Node) else n for n in node.args[:2])
    if node.kwargs.get("alpha", 1) != 1 or not all(isinstance(v, (Value, Tensor)) for v in (a, b)):
        raise UnsupportedError(node, "it has an operand that is no tensor")
    shape = planner.shapes[node].shape
    left, right = planner.as_value(a), planner.as_value(b)
    if {left.dtype, right.dtype} != {torch.float32}:
        raise UnsupportedError(node, "it mixes types")
    commutes = node.target is not torch.sub
    if left.shape != shape and commutes:
        left, right = right, left
    if left.shape != shape:
        raise UnsupportedError(node, "both operands broadcast")
    right = Value(right.tensor.expand(shape), right.buffer)
    operands = {"a": left, "b": right}
    return _rows(planner, node, "pair_rows", operands, {"kind": _PAIRS[node.target]}, 1.0)


def _argument(node: fx.Node, index: int, name: str, default: Any = ...) -> Any:
    if len(node.args) > index:
        return node.args[index]
    found = node.kwargs.get(name, default)
    if found is ...:
        raise UnsupportedError(node, f"its {name} is missing")
    return found


def _operand(planner: Planner, node: Any) -> Value:
    value = planner.value(node)
    if value.dtype != torch.float32:
        raise UnsupportedError(planner.current, f"it reads {value.dtype}")
    return value


# -- rows ----------------------------------------------------------------------------------


def _rows(
    planner: Planner,
    node: fx.Node,
    kernel: str,
    operands: dict[str, Value],
    fields: dict[str, Any],
    cost: float,
) -> Value:
    """Emit a kernel over rows of the first operand, whose columns lie next to each other.

    Row kernels work along the last dimension; element by element any dimension may be the row.
    """
    first = next(iter(operands.values()))
    shape = first.shape
    along_last = kernel in ("layer_norm_rows", "softmax_rows")
    axis = len(shape) - 1 if along_last else _columns(operands)
    if axis is None or (first.strides[axis] != 1 and shape[axis] > 1):
        dense = planner.dense(first.tensor)
        planner.copy(first, dense)
        name = next(iter(operands))
        operands = {**operands, name: dense}
        first = dense
        axis = len(shape) - 1
        if any(v.strides[axis] != 1 and shape[axis] > 1 for v in operands.values()):
            raise UnsupportedError(node, "its operands lie in different orders")
    codes, needs_floats = _codes(planner, node, first, axis)
    y: Value | None = None
    if needs_floats or codes is None:
        y = _like(planner, node, first, axis)
    outputs = {name: v for name, v in (("y", y), ("codes", codes)) if v is not None}
    all_values = {**operands, **outputs}
    rest = [d for d in range(len(shape)) if d != axis]
    loops = Loops.of(
        [shape[d] for d in rest],
        [[value.strides[d] for d in rest] for value in all_values.values()],
        planner.batched and axis != 0,
    )
    padded = loops.padded(3, planner.batched)
    if padded is None or (planner.batched and axis == 0):
        raise UnsupportedError(node, "its rows lie in too many dimensions")
    all_fields = {
        **fields,
        "samples": planner.count(padded.sizes[0]) if planner.batched else padded.sizes[0],
        "outer": padded.sizes[1],
        "inner": padded.sizes[2],
        "columns": shape[axis],
    }
    for (name, value), strides in zip(all_values.items(), padded.strides, strict=True):
        all_fields[name] = planner.at(value)
        all_fields[f"{name}_strides"] = planner.numbers(strides)
    if codes is not None:
        all_fields |= planner.quantizers.pop(node)
    planner.emit(
        kernel,
        all_fields,
        list(operands.values()),
        list(outputs.values()),
        cost * math.prod(shape) / 16,
    )
    if y is not None:
        return y
    assert codes is not None
    # Nobody reads the floats: what stands for them is the codes, which their quantizer finds.
    return Value(torch.empty(shape, dtype=torch.float32, device="meta"), codes.buffer)


def _columns(operands: dict[str, Value]) -> int | None:
    """The dimension along which the elements of all operands lie next to each other."""
    values = list(operands.values())
    for axis in range(len(values[0].shape) - 1, 0, -1):
        if values[0].shape[axis] > 1 and all(v.strides[axis] == 1 for v in values):
            return axis
    return None


def _like(planner: Planner, node: fx.Node, first: Value, axis: int) -> Value:
    """Memory in the order of the first operand, so that the columns stay where they are."""
    y = planner.allocate(first)
    if y.strides[axis] == 1 or y.shape[axis] == 1:
        return y
    return planner.ordered(y.tensor, first)


def _codes(planner: Planner, node: fx.Node, first: Value, axis: int) -> tuple[Value | None, bool]:
    """Where the quantizer behind a node writes, and whether others read the floats."""
    for user in node.users:
        if user.target is OPS.quantize.default:
            found = _quantizer(planner, node, user, None, first, axis)
            if found is not None:
                return found, len(node.users) > 1
        if user.target is torch.permute:
            for reader in user.users:
                if reader.target is OPS.quantize.default:
                    order: Any = _argument(user, 1, "dims")
                    found = _quantizer(planner, node, reader, list(order), first, axis)
                    if found is not None:
                        return found, len(node.users) > 1 or len(user.users) > 1
    return None, True


def _quantizer(
    planner: Planner,
    node: fx.Node,
    quantize: fx.Node,
    order: Sequence[int] | None,
    first: Value,
    axis: int,
) -> Value | None:
    arguments = operator_arguments(quantize)
    if arguments["dtype"] != torch.uint8:
        return None
    moved = first.tensor if order is None else first.tensor.permute(list(order))
    with planner.standing_for(quantize):
        # Not `first` itself: what the caller owns says nothing about the order.
        value = planner.allocate(Value(moved, Buffer("arena", 0, image=first.buffer.image)))
    tensor = value.tensor
    if order is not None:
        back = sorted(range(len(order)), key=lambda d: order[d])
        tensor = tensor.permute(back)
    if tensor.stride(axis) != 1 and tensor.shape[axis] > 1:
        return None
    planner.ready[quantize] = value
    planner.quantizers[node] = {
        "inverse": float(float32_scalar(1.0) / float32_scalar(arguments["scale"])),
        "zero_point": arguments["zero_point"],
        "lo": arguments["qmin"],
        "hi": arguments["qmax"],
    }
    return Value(tensor, value.buffer)
