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
    "lower_clamp",
    "lower_float_function",
    "lower_float_pair",
    "lower_layer_norm",
    "lower_softmax",
]

OPS: Any = torch.ops.fxquant
_FUNCTIONS: dict[Any, int] = {F.relu: 1, torch.relu: 1, F.gelu: 2}
_CLAMP = 3
_PAIRS: dict[Any, int] = {torch.add: 0, torch.sub: 1, torch.mul: 2, torch.div: 3}


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
    return _rows(planner, node, "layer_norm_rows", {"x": x}, fields, 4.0, len(x.shape) - 1)


def lower_softmax(planner: Planner, node: fx.Node) -> Value:
    """Over one dimension; its numerators alone, over the last, where a weighted mean follows."""
    x = _operand(planner, _argument(node, 0, "input"))
    fields: dict[str, Any] = {"divide": 1}
    operands = {"x": x}
    axis = len(x.shape) - 1
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
        axis = dim % len(x.shape)
    return _rows(planner, node, "softmax_rows", operands, fields, 6.0, axis)


def lower_float_function(planner: Planner, node: fx.Node) -> Value:
    """One function of each element."""
    if node.kwargs.get("approximate", "none") != "none":
        raise UnsupportedError(node, "it is another form of GELU")
    x = _operand(planner, _argument(node, 0, "input"))
    fields = {"function": _FUNCTIONS[node.target]}
    return _rows(planner, node, "function_rows", {"x": x}, fields, 4.0)


def lower_clamp(planner: Planner, node: fx.Node) -> Value:
    """`clamp`, `hardtanh` and `relu6`, between two numbers or at one."""
    least, most = _bounds(node)
    if any(isinstance(bound, (fx.Node, Tensor)) for bound in (least, most)):
        raise UnsupportedError(node, "its bounds are computed")
    x = _operand(planner, _argument(node, 0, "input"))
    fields = {
        "function": _CLAMP,
        "least": -math.inf if least is None else float(least),
        "most": math.inf if most is None else float(most),
    }
    return _rows(planner, node, "function_rows", {"x": x}, fields, 1.0)


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    if node.target is F.relu6:
        return 0.0, 6.0
    names = ("min_val", "max_val") if node.target is F.hardtanh else ("min", "max")
    default = None if node.target is torch.clamp else ...
    return _argument(node, 1, names[0], default), _argument(node, 2, names[1], default)


def lower_float_pair(planner: Planner, node: fx.Node) -> Value:
    """A sum, difference, product or quotient of tensors, or with a number; one may broadcast."""
    a, b = (planner.values[n] if isinstance(n, fx.Node) else n for n in node.args[:2])
    if set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
        raise UnsupportedError(node, "it is another form of it")
    shape = planner.shapes[node].shape
    left, right = (
        _number(planner, v, shape) if isinstance(v, (int, float)) else planner.as_value(v)
        for v in (a, b)
    )
    if {left.dtype, right.dtype} != {torch.float32}:
        raise UnsupportedError(node, "it mixes types")
    commutes = node.target in (torch.add, torch.mul)
    if commutes and (left.shape != shape or not any(left.strides)):
        left, right = right, left
    if left.shape != shape:
        raise UnsupportedError(node, "both operands broadcast")
    right = Value(right.tensor.expand(shape), right.buffer)
    operands = {"a": left, "b": right}
    fields = {"kind": _PAIRS[node.target]}
    return _rows(planner, node, "pair_rows", operands, fields, 1.0)


def _number(planner: Planner, number: float, shape: Sequence[int]) -> Value:
    meta = torch.empty(1, dtype=torch.float32, device="meta")
    return Value(meta.expand(shape), planner.constant(torch.tensor([float(number)])))


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
    axis: int | None = None,
) -> Value:
    """Emit a kernel over rows of the first operand, whose columns lie next to each other.

    A row runs along dimension `axis`; element by element any dimension may be the row.
    """
    first = next(iter(operands.values()))
    shape = first.shape
    axis = _columns(operands) if axis is None else axis
    if axis is None or (first.strides[axis] != 1 and shape[axis] > 1):
        axis = len(shape) - 1 if axis is None else axis
        dense = planner.ending_with(first.tensor, axis)
        planner.copy(first, dense)
        name = next(iter(operands))
        operands = {**operands, name: dense}
        first = dense
        if not _can_be_columns(list(operands.values()), axis):
            raise UnsupportedError(node, "its operands lie in different orders")
    if "b" in operands:
        fields = {**fields, "b_step": int(operands["b"].strides[axis] != 0)}
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
        if values[0].shape[axis] > 1 and _can_be_columns(values, axis):
            return axis
    return None


def _can_be_columns(values: Sequence[Value], axis: int) -> bool:
    """Whether the first has its elements next to each other, and the others so or broadcast."""
    if values[0].shape[axis] == 1:
        return True
    return values[0].strides[axis] == 1 and all(v.strides[axis] in (0, 1) for v in values)


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
