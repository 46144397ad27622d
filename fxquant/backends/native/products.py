"""Products of two activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.attention import lower_attention
from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import type_number
from fxquant.backends.native.values import Loops, Value
from fxquant.integer.rounding import float32_scalar

__all__ = ["lower_product"]

OPS: Any = torch.ops.fxquant
_CODES, _FLOATS, _SUMS, _MEAN_CODES, _MEAN_FLOATS = range(5)


def lower_product(planner: Planner, node: fx.Node) -> Value:
    """`matmul`, `weighted_mean` and `matmul_accumulate`."""
    if node in planner.attention:
        return lower_attention(planner, node, planner.attention[node])
    arguments = planner.arguments(node)
    a, b = planner.value(arguments["a"]), planner.value(arguments["b"])
    y = planner.allocate(None)
    is_float = arguments.get("dtype") == torch.float32
    fields: dict[str, Any] = {
        "a_zero_point": arguments["a_zero_point"],
        "b_zero_point": arguments["b_zero_point"],
    }
    finish = _SUMS
    if node.target is OPS.matmul.default:
        factor = arguments["a_scale"] * arguments["b_scale"] * arguments["alpha"]
        finish = _FLOATS if is_float else _CODES
    elif node.target is OPS.weighted_mean.default:
        factor = arguments["b_scale"]
        finish = _MEAN_FLOATS if is_float else _MEAN_CODES
    if finish != _SUMS:
        fields["multiplier"] = float(
            float32_scalar(factor if is_float else factor / arguments["scale"])
        )
        if not is_float:
            fields |= {
                "zero_point": arguments["zero_point"],
                "lo": arguments["qmin"],
                "hi": arguments["qmax"],
            }
    if not _fast(planner, finish, a, b, y, fields):
        _plain(planner, finish, a, b, y, fields)
    return y


def _batch_dims(value: Value, shape: tuple[int, ...]) -> list[int]:
    """Strides of the dimensions in front of the matrix, broadcast to `shape`."""
    tensor = value.tensor
    return list(tensor.expand(*shape, *tensor.shape[-2:]).stride()[:-2])


def _fast(
    planner: Planner, finish: int, a: Value, b: Value, y: Value, fields: dict[str, Any]
) -> bool:
    rows, depth, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if finish == _SUMS or {a.dtype, b.dtype} != {torch.uint8} or not y.tensor.numel():
        return False
    if y.dtype not in (torch.uint8, torch.float32) or y.strides[-1] != 1:
        return False
    if a.strides[-1] != 1 and a.strides[-2] != 1:
        return False
    if b.strides[-1] != 1 and b.strides[-2] != 1:
        return False
    reach = 65025 * depth
    if reach >= 2**31 or (y.dtype == torch.uint8 and reach * abs(fields["multiplier"]) >= 2**30):
        return False
    shape = y.shape[:-2]
    strides = [_batch_dims(value, shape) for value in (y, a, b)]
    if planner.batched and not shape:
        return False
    padded = Loops.of(shape, strides, planner.batched).padded(2, planner.batched)
    if padded is None:
        return False
    size = y.dtype.itemsize
    (y_batch, y_head), (a_batch, a_head), (b_batch, b_head) = padded.strides
    step = {
        **fields,
        "a": planner.at(a),
        "b": planner.at(b),
        "y": planner.at(y),
        "a_batch": a_batch,
        "a_head": a_head,
        "a_row": a.strides[-2],
        "a_k": a.strides[-1],
        "b_batch": b_batch,
        "b_head": b_head,
        "b_k": b.strides[-2],
        "b_column": b.strides[-1],
        "y_batch": y_batch * size,
        "y_head": y_head * size,
        "y_row": y.strides[-2] * size,
        "batch": planner.count(padded.sizes[0]) if planner.batched else padded.sizes[0],
        "heads": padded.sizes[1],
        "rows": rows,
        "columns": columns,
        "depth": depth,
        "kind": 2 if y.dtype == torch.float32 else 0,
        "by_sum": int(finish in (_MEAN_CODES, _MEAN_FLOATS)),
    }
    work = math.prod(padded.sizes) * rows * columns * (depth / 200 + 0.1)
    planner.emit("matmul", step, (a, b), (y,), work)
    return True


def _plain(
    planner: Planner, finish: int, a: Value, b: Value, y: Value, fields: dict[str, Any]
) -> None:
    shape = y.shape[:-2]
    if len(shape) > (4 if planner.batched else 3):
        raise UnsupportedError(planner.current, "a tensor of too many dimensions")
    front = 0 if planner.batched else 1
    fill = 4 - front - len(shape)

    def spread(values: list[int], filler: int) -> list[int]:
        head = [filler] if front else values[:1]
        return head + [filler] * fill + (values if front else values[1:])

    if planner.batched and not shape:
        raise UnsupportedError(planner.current, "its rows are samples")
    a_strides, b_strides, y_strides = (_batch_dims(value, shape) for value in (a, b, y))
    step = {
        **fields,
        "a": planner.at(a),
        "b": planner.at(b),
        "y": planner.at(y),
        "shape": planner.numbers([*spread(list(shape), 1), *y.shape[-2:]]),
        "a_strides": planner.numbers([*spread(a_strides, 0), *a.strides[-2:]]),
        "b_strides": planner.numbers([*spread(b_strides, 0), b.strides[-1], b.strides[-2]]),
        "y_strides": planner.numbers([*spread(y_strides, 0), *y.strides[-2:]]),
        "samples": planner.samples(y),
        "depth": a.shape[-1],
        "finish": finish,
        "a_type": type_number(a.dtype),
        "b_type": type_number(b.dtype),
        "y_type": type_number(y.dtype),
    }
    planner.emit("plain_matmul", step, (a, b), (y,), 3.0 * math.prod(y.shape) * a.shape[-1])
