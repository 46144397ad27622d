"""Exact sums of products of codes, and the layers that leave them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.export.onnx.codes import centered, zero_point_of
from fxquant.export.onnx.weights import stored_weight, weight_zero_point
from fxquant.export.onnx.writer import Writer
from fxquant.integer.bounds import accumulator_dtype

__all__ = [
    "emit_conv_accumulate",
    "emit_linear_accumulate",
    "emit_matmul_accumulate",
    "emit_mul_accumulate",
    "integer_products",
    "integer_sums",
    "windows",
]


def windows(a: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a convolution."""
    found = {
        "strides": list(a["stride"]),
        "pads": list(a["padding"]) * 2,
        "dilations": list(a["dilation"]),
        "group": a["groups"],
    }
    if "output_padding" in a and any(a["output_padding"]):
        found["output_padding"] = list(a["output_padding"])
    return found


def integer_sums(
    w: Writer,
    kind: str,
    x: ir.Value,
    codes: torch.dtype,
    zero_point: int,
    weight: Tensor,
    shift: Tensor | None,
    name: str,
    attributes: Mapping[str, Any],
) -> ir.Value:
    """``Σ (q_x − z_x)(q_w − z_w)`` by ConvInteger or MatMulInteger (of rows, [rows, K]).

    int32, or int64 for 16-bit codes, which go in as two bytes. Affine weights are the sum of two
    int8 tensors: what runtimes make of a zero point for each channel differs.
    """
    rows = kind == "MatMulInteger"
    options = {} if rows else dict(attributes)

    def of(operand: ir.Value, zero: int, dtype: torch.dtype) -> ir.Value:
        total: ir.Value | None = None
        for index, part in enumerate(_bytes(weight, shift)):
            stored = part.t().contiguous() if rows else part
            label = f"{name}_{index}" if index or shift is not None else name
            label += "_transposed" if rows else ""
            value = stored_weight(w, stored, label)
            zeros = zero_point_of(w, zero, dtype), weight_zero_point(w)
            found = w.op(kind, operand, value, *zeros, **options)
            total = found if total is None else w.op("Add", total, found)
        assert total is not None
        return total

    if codes != torch.int16:
        return of(x, zero_point, codes)
    # x + 2^15 = 256 · high + low: x − z = 256 · (high − 128) + low − z, and z is 0.
    if zero_point:
        raise w.refusal("16-bit codes with a zero point")
    high, low = _two_bytes(w, x)
    wide = w.cast(of(high, 128, torch.uint8), torch.int64)
    scaled = w.op("Mul", wide, w.scalar(256, torch.int64))
    return w.op("Add", scaled, w.cast(of(low, 0, torch.uint8), torch.int64))


def _bytes(weight: Tensor, shift: Tensor | None) -> list[Tensor]:
    if shift is None:
        return [weight]
    along = [-1] + [1] * (weight.dim() - 1) if shift.numel() > 1 else []
    full = weight.to(torch.int32) - shift.to(torch.int32).reshape(along)
    first = full.clamp(-128, 127)
    rest = (full - first).to(torch.int8)
    return [first.to(torch.int8), *([rest] if bool(rest.any()) else [])]


def _two_bytes(w: Writer, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The high and the low byte of ``x + 2^15``, as uint8."""
    wide = w.op("Add", w.cast(x, torch.int32), w.scalar(2**15, torch.int32))
    byte = w.scalar(256, torch.int32)
    high = w.op("Div", wide, byte)
    low = w.op("Sub", wide, w.op("Mul", high, byte))
    return w.cast(high, torch.uint8), w.cast(low, torch.uint8)


def integer_products(w: Writer, a: fx.Node, a_zero: int, b: fx.Node, b_zero: int) -> ir.Value:
    """``Σ (q_a − z_a)(q_b − z_b)`` of two activations: int32, or int64 with 16 bits.

    16-bit operands are multiplied as float64, which holds every sum that the reference accepts.
    """
    left, right = w.value(a), w.value(b)
    types = w.shapes[a].dtype, w.shapes[b].dtype
    if accumulator_dtype(*types) == torch.int64:
        wide = (
            centered(w, left, a_zero, torch.float64),
            centered(w, right, b_zero, torch.float64),
        )
        return w.cast(w.op("MatMul", *wide), torch.int64)
    zeros = zero_point_of(w, a_zero, types[0]), zero_point_of(w, b_zero, types[1])
    return w.op("MatMulInteger", left, right, *zeros)


def _layer(w: Writer, kind: str, x: ir.Value, attributes: Mapping[str, Any]) -> ir.Value:
    a = w.arguments
    weight, codes = w.tensor(a["weight"]), w.shapes[a["x"]].dtype
    shift = None if a["weight_zero_point"] is None else w.tensor(a["weight_zero_point"])
    name = str(a["weight"].target)
    sums = integer_sums(w, kind, x, codes, a["x_zero_point"], weight, shift, name, attributes)
    if a["bias"] is None:
        return sums
    bias = w.tensor(a["bias"]).to(accumulator_dtype(codes))
    spatial = [1] * (weight.dim() - 2)
    summand = w.constant(bias.reshape(-1, *spatial), str(a["bias"].target))
    return w.op("Add", sums, summand)


def emit_conv_accumulate(w: Writer, node: fx.Node) -> ir.Value:
    """ConvInteger and the bias."""
    a = w.arguments
    if len(w.sizes(a["x"])) != w.tensor(a["weight"]).dim():
        raise w.refusal("its input has no batch")
    return _layer(w, "ConvInteger", w.value(a["x"]), windows(a))


def emit_linear_accumulate(w: Writer, node: fx.Node) -> ir.Value:
    """MatMulInteger and the bias."""
    return _layer(w, "MatMulInteger", w.value(w.arguments["x"]), {})


def emit_matmul_accumulate(w: Writer, node: fx.Node) -> ir.Value:
    """MatMulInteger."""
    a = w.arguments
    return integer_products(w, a["a"], a["a_zero_point"], a["b"], a["b_zero_point"])


def emit_mul_accumulate(w: Writer, node: fx.Node) -> ir.Value:
    """The product of the centred codes."""
    a = w.arguments
    wide = accumulator_dtype(w.shapes[a["a"]].dtype, w.shapes[a["b"]].dtype)
    left = centered(w, w.value(a["a"]), a["a_zero_point"], wide)
    right = centered(w, w.value(a["b"]), a["b_zero_point"], wide)
    return w.op("Mul", left, right)
