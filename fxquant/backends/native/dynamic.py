"""Layers whose input is quantized when it is known, and recurrent ones of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import Pointer
from fxquant.backends.native.values import Buffer, Value
from fxquant.integer.bounds import INT32_LIMIT

__all__ = ["lower_linear_dynamic", "lower_recurrent"]

OPS: Any = torch.ops.fxquant
_BLOCK = 16
_RANGE_BYTES = 64


def lower_linear_dynamic(planner: Planner, node: fx.Node) -> Value:
    """Float in and out. The range is that of the whole batch, which therefore stays together."""
    arguments = planner.arguments(node)
    planner.whole_batch = True
    x = _dense(planner, planner.value(arguments["x"]))
    y = planner.dense(planner.shapes[node])
    _linear(planner, x, y, [arguments[key] for key in ("weight", "weight_scale", "bias")])
    return y


def lower_recurrent(planner: Planner, node: fx.Node) -> tuple[Value, ...]:
    """`lstm_dynamic` and `gru_dynamic`: the output, and the last state of every layer."""
    if planner.batched:
        raise UnsupportedError(node, "its samples depend on each other")
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    steps_first = x.tensor.transpose(0, 1) if arguments["batch_first"] else x.tensor
    steps, batch = steps_first.shape[:2]
    if not steps:
        raise UnsupportedError(node, "the sequence is empty")
    layer_input = _dense(planner, Value(steps_first, x.buffer))
    is_lstm = node.target is OPS.lstm_dynamic.default
    last = [planner.dense(shape) for shape in planner.shapes[node][1:]]
    first = [_dense(planner, planner.value(state)) for state in arguments["hx"]]
    weights, scales, biases = (arguments[key] for key in ("weights", "scales", "biases"))
    hidden = planner.tensor(weights[1]).shape[1]
    directions = 2 if arguments["bidirectional"] else 1
    gates = (4 if is_lstm else 3) * hidden
    room = (_room(planner, (batch, hidden), torch.uint8), _room(planner, (batch, gates)))
    layers = [(weights[i], scales[i], biases[i] if biases else None) for i in range(len(weights))]
    y = layer_input
    for index in range(len(layers) // 2):
        if index % directions == 0:
            layer_input, y = y, _room(planner, (steps, batch, directions * hidden))
        from_input = _room(planner, (steps, batch, gates))
        _linear(planner, layer_input, from_input, layers[2 * index])
        weight, scale, bias = _packed(planner, *layers[2 * index + 1])
        start = index % directions * hidden
        fields: dict[str, Any] = {
            "x": planner.at(from_input),
            "weight": weight,
            "scale": scale,
            "bias": bias,
            "y": planner.at(Value(y.tensor[:, :, start:], y.buffer)),
            "codes": planner.at(room[0]),
            "gates": planner.at(room[1]),
            "steps": steps,
            "batch": batch,
            "hidden": hidden,
            "y_step": y.strides[0],
            "y_sample": y.strides[1],
            "kind": 0 if is_lstm else 1,
            "reverse": index % directions,
        }
        states = dict(zip(("h", "c"), last, strict=False))
        states |= dict(zip(("h_first", "c_first"), first, strict=False))
        fields |= {
            name: planner.at(Value(state.tensor[index], state.buffer))
            for name, state in states.items()
        }
        work = 2.0 * steps * batch * gates * (hidden / 16 + 10)
        planner.emit("recurrent", fields, (from_input, *first), (y, *last, *room), work)
    if arguments["batch_first"]:
        y = Value(y.tensor.transpose(0, 1), y.buffer)
    return (y, *last)


def _linear(planner: Planner, x: Value, y: Value, layer: Any) -> None:
    """Range, codes and product of dense floats [..., K]."""
    size, depth, outputs = math.prod(x.shape), x.shape[-1], y.shape[-1]
    # A batch of one still needs the whole of it.
    bounds = Value(
        torch.empty(_RANGE_BYTES // 4, device="meta"),
        Buffer("arena", _RANGE_BYTES * (planner.batch or 1)),
    )
    planner.emit(
        "dynamic_range",
        {"x": planner.at(x), "range": planner.at(bounds), "size": planner.count(size)},
        (x,),
        (bounds,),
        0.1 * size,
    )
    codes = _room(planner, x.shape, torch.uint8)
    fields: dict[str, Any] = {
        "x": planner.at(x),
        "range": planner.at(bounds),
        "y": planner.at(codes),
        "size": planner.count(size),
    }
    planner.emit("dynamic_quantize", fields, (x, bounds), (codes,), 0.1 * size)
    weight, scale, bias = _packed(planner, *layer)
    rows = math.prod(x.shape[:-1])
    fields = {
        "x": planner.at(codes),
        "range": planner.at(bounds),
        "weight": weight,
        "scale": scale,
        "bias": bias,
        "y": planner.at(y),
        "rows": planner.count(rows),
        "depth": depth,
        "outputs": outputs,
    }
    work = rows * outputs * (depth / 16 + 1)
    planner.emit("dynamic_linear", fields, (codes, bounds), (y,), work)


def _packed(
    planner: Planner, weight: fx.Node, scale: fx.Node, bias: fx.Node | None
) -> tuple[Pointer, Pointer, Pointer | None]:
    """The weight in blocks of 16 outputs, and its scale of each of them."""
    matrix = planner.tensor(weight)
    outputs, depth = matrix.shape
    if depth * 255 * 128 > INT32_LIMIT:
        raise UnsupportedError(planner.current, "its sums could leave int32")
    blocks = -(-outputs // _BLOCK)
    padded = torch.zeros(blocks * _BLOCK, depth, dtype=torch.int8)
    padded[:outputs] = matrix
    packed = padded.reshape(blocks, _BLOCK, depth).transpose(1, 2).contiguous()
    scales = planner.tensor(scale).to(torch.float32).expand(outputs).contiguous()
    shift = None if bias is None else planner.data(planner.tensor(bias))
    return planner.data(packed), planner.data(scales), shift


def _room(planner: Planner, shape: Any, dtype: torch.dtype = torch.float32) -> Value:
    return planner.dense(torch.empty(tuple(shape), dtype=dtype, device="meta"))


def _dense(planner: Planner, value: Value) -> Value:
    if value.dtype != torch.float32:
        raise UnsupportedError(planner.current, f"it reads {value.dtype}")
    like: Tensor = torch.empty(value.shape, device="meta")
    if value.tensor.is_contiguous():
        return value
    dense = planner.dense(like)
    planner.copy(value, dense)
    return dense
