"""Attention as one kernel: scores, numerators of the softmax and the mean of the values by head."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fxquant.backends.native.patterns import Attention
from fxquant.backends.native.planner import Planner
from fxquant.backends.native.values import Loops, Value
from fxquant.integer.rounding import float32_scalar

__all__ = ["lower_attention"]


def lower_attention(planner: Planner, node: fx.Node, attention: Attention) -> Value:
    """A weighted mean whose weights nobody has computed."""
    mean, scores = planner.arguments(node), planner.arguments(attention.scores)
    codes = planner.arguments(attention.quantize)
    q = planner.value(scores["a"])
    k = planner.value(scores["b"])
    k = _channels_inside(planner, Value(k.tensor.transpose(-1, -2), k.buffer))
    q = _channels_inside(planner, q)
    v = _channels_inside(planner, planner.value(mean["b"]))
    y = planner.allocate(None)
    values = [y, q, k, v]
    loops = Loops.of(y.shape[:-2], [v.strides[:-2] for v in values], planner.batched)
    padded = loops.padded(2, planner.batched)
    if padded is None or y.strides[-1] != 1:
        values = [planner.dense(v.tensor) if v is y else _dense(planner, v) for v in values]
        loops = Loops.of(y.shape[:-2], [v.strides[:-2] for v in values], planner.batched)
        padded = loops.padded(2, planner.batched)
        assert padded is not None
        y, q, k, v = values
    fields: dict[str, Any] = {
        "batch": planner.count(padded.sizes[0]) if planner.batched else padded.sizes[0],
        "heads": padded.sizes[1],
        "rows": q.shape[-2],
        "columns": k.shape[-2],
        "depth": q.shape[-1],
        "width": v.shape[-1],
        "q_zero_point": scores["a_zero_point"],
        "k_zero_point": scores["b_zero_point"],
        "v_zero_point": mean["b_zero_point"],
        "zero_point": mean["zero_point"],
        "lo": mean["qmin"],
        "hi": mean["qmax"],
        "score_multiplier": _single(scores["a_scale"] * scores["b_scale"] * scores["alpha"]),
        "inverse": float(float32_scalar(1.0) / float32_scalar(codes["scale"])),
        "multiplier": _single(mean["b_scale"] / mean["scale"]),
    }
    for name, value, strides in zip("yqkv", (y, q, k, v), padded.strides, strict=True):
        fields[name] = planner.at(value)
        fields[f"{name}_batch"], fields[f"{name}_head"] = strides
        fields[f"{name}_row"] = value.strides[-2]
    products = q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    planner.emit("attention", fields, (q, k, v), (y,), math.prod(y.shape[:-2]) * products / 100)
    return y


def _single(value: float) -> float:
    return float(float32_scalar(value))


def _channels_inside(planner: Planner, value: Value) -> Value:
    return value if value.strides[-1] == 1 else _dense(planner, value)


def _dense(planner: Planner, value: Value) -> Value:
    dense = planner.dense(value.tensor)
    planner.copy(value, dense)
    return dense
