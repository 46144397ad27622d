"""LSTMs and GRUs whose inputs are quantized at run time: one Scan a layer and direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch import fx

from fxquant.export.onnx.dynamic import DynamicWeight
from fxquant.export.onnx.writer import Writer

__all__ = ["emit_gru_dynamic", "emit_lstm_dynamic"]

_Cell = Callable[[Writer, ir.Value, DynamicWeight, Sequence[ir.Value]], tuple[ir.Value, ...]]


def emit_lstm_dynamic(w: Writer, node: fx.Node) -> tuple[ir.Value, ...]:
    """Output, h_n and c_n: see `fxquant.integer.dynamic.lstm_dynamic`."""
    return _recur(w, _lstm_cell, 2)


def emit_gru_dynamic(w: Writer, node: fx.Node) -> tuple[ir.Value, ...]:
    """Output and h_n: see `fxquant.integer.dynamic.gru_dynamic`."""
    return _recur(w, _gru_cell, 1)


def _lstm_cell(
    w: Writer, from_input: ir.Value, weight: DynamicWeight, state: Sequence[ir.Value]
) -> tuple[ir.Value, ...]:
    h, c = state
    i, f, g, o = w.ops(
        "Split", 4, w.op("Add", weight.apply(w, h), from_input), axis=1, num_outputs=4
    )
    kept = w.op("Mul", w.op("Sigmoid", f), c)
    c = w.op("Add", kept, w.op("Mul", w.op("Sigmoid", i), w.op("Tanh", g)))
    return w.op("Mul", w.op("Sigmoid", o), w.op("Tanh", c)), c


def _gru_cell(
    w: Writer, from_input: ir.Value, weight: DynamicWeight, state: Sequence[ir.Value]
) -> tuple[ir.Value, ...]:
    (h,) = state
    reset_h, update_h, new_h = w.ops("Split", 3, weight.apply(w, h), axis=1, num_outputs=3)
    reset_x, update_x, new_x = w.ops("Split", 3, from_input, axis=1, num_outputs=3)
    reset = w.op("Sigmoid", w.op("Add", reset_h, reset_x))
    update = w.op("Sigmoid", w.op("Add", update_h, update_x))
    new = w.op("Tanh", w.op("Add", new_x, w.op("Mul", new_h, reset)))
    return (w.op("Add", w.op("Mul", w.op("Sub", h, new), update), new),)


def _recur(w: Writer, cell: _Cell, states: int) -> tuple[ir.Value, ...]:
    """All layers and directions over time: the output, and the last value of every state."""
    a = w.arguments
    biases = a["biases"] or [None] * len(a["weights"])
    weights = [
        DynamicWeight.of(w, *constants)
        for constants in zip(a["weights"], a["scales"], biases, strict=True)
    ]
    directions = 2 if a["bidirectional"] else 1
    swapped = [1, 0, 2]
    sequence = w.value(a["x"])
    if a["batch_first"]:
        sequence = w.op("Transpose", sequence, perm=swapped)
    last: list[list[ir.Value]] = []
    for layer in range(a["num_layers"]):
        outputs = []
        for index in range(layer * directions, (layer + 1) * directions):
            steps = weights[2 * index].apply(w, sequence)
            state = _initial(w, index, states)
            hidden = weights[2 * index + 1]
            *state, output = _scan(w, cell, hidden, state, steps, backward=index % directions == 1)
            outputs.append(output)
            last.append(state)
        sequence = w.op("Concat", *outputs, axis=2) if directions == 2 else outputs[0]
    if a["batch_first"]:
        sequence = w.op("Transpose", sequence, perm=swapped)
    first = w.numbers(0)
    stacked = [
        w.op("Concat", *(w.op("Unsqueeze", value, first) for value in values), axis=0)
        for values in zip(*last, strict=True)
    ]
    return sequence, *stacked


def _initial(w: Writer, index: int, states: int) -> list[ir.Value]:
    """The states [B, H] that a layer and direction starts with."""
    a = w.arguments
    if a["hx"]:
        place = w.scalar(index, torch.int64)
        return [w.op("Gather", w.value(value), place, axis=0) for value in a["hx"]]
    x = w.shapes[a["x"]]
    batch = 0 if a["batch_first"] else 1
    hidden = w.tensor(a["weights"][1]).shape[1]
    shape = w.shape((x.sizes[batch], hidden), (x.batched[batch], False))
    return [w.op("Expand", w.scalar(0.0, torch.float32), shape)] * states


def _scan(
    w: Writer,
    cell: _Cell,
    weight: DynamicWeight,
    state: Sequence[ir.Value],
    steps: ir.Value,
    *,
    backward: bool,
) -> tuple[ir.Value, ...]:
    """The last states and the outputs of all steps [T, B, H]."""
    with w.body(len(state) + 1) as body:
        *before, step = body.inputs
        after = cell(w, step, weight, before)
        body.outputs.extend([*after, w.op("Identity", after[0])])
    direction = [int(backward)]
    return w.ops(
        "Scan",
        len(state) + 1,
        *state,
        steps,
        body=body,
        num_scan_inputs=1,
        scan_input_directions=direction,
        scan_output_directions=direction,
    )
