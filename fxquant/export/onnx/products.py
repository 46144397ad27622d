"""Products of two activations, and the mean that attention takes of its values."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from fxquant.export.onnx.codes import centered, dequantized, to_codes, zero_point_of
from fxquant.export.onnx.sums import integer_products
from fxquant.export.onnx.writer import Writer
from fxquant.integer.bounds import accumulator_dtype
from fxquant.integer.rounding import float32_scalar

__all__ = ["emit_matmul", "emit_weighted_mean"]


def emit_matmul(w: Writer, node: fx.Node) -> ir.Value:
    """QLinearMatMul with neutral scales is exact; DQ-MatMul-Q becomes one with true ones."""
    a = w.arguments
    types = [w.shapes[a[name]].dtype for name in ("a", "b")]
    floats = a["dtype"] == torch.float32
    alpha = a["a_scale"] * a["b_scale"] * a["alpha"]
    multiplier = float32_scalar(alpha if floats else alpha / a["scale"])
    if not w.options.exact and not w.options.operators:
        left = dequantized(
            w, w.value(a["a"]), a["a_scale"] * a["alpha"], a["a_zero_point"], types[0]
        )
        right = dequantized(w, w.value(a["b"]), a["b_scale"], a["b_zero_point"], types[1])
        real = w.op("MatMul", left, right)
        return real if floats else to_codes(w, real, *_output(w), a["scale"])
    if floats or torch.int16 in (*types, a["dtype"]):
        sums = integer_products(w, a["a"], a["a_zero_point"], a["b"], a["b_zero_point"])
        factor = w.scalar(float(multiplier), torch.float32)
        real = w.op("Mul", w.cast(sums, torch.float32), factor)
        return real if floats else to_codes(w, real, *_output(w))
    one = w.scalar(1.0, torch.float32)
    codes: ir.Value = w.op(
        "QLinearMatMul",
        w.value(a["a"]),
        w.scalar(float(multiplier), torch.float32),
        zero_point_of(w, a["a_zero_point"], types[0]),
        w.value(a["b"]),
        one,
        zero_point_of(w, a["b_zero_point"], types[1]),
        one,
        zero_point_of(w, a["zero_point"], a["dtype"]),
    )
    info = torch.iinfo(a["dtype"])
    if (a["qmin"], a["qmax"]) != (info.min, info.max):
        codes = w.op("Clip", codes, *(w.scalar(a[n], a["dtype"]) for n in ("qmin", "qmax")))
    return codes


def emit_weighted_mean(w: Writer, node: fx.Node) -> ir.Value:
    """Sums over sums of weights, both rounded to float32 once; 0 where all weights are 0."""
    a = w.arguments
    floats = a["dtype"] == torch.float32
    wide = accumulator_dtype(w.shapes[a["a"]].dtype, w.shapes[a["b"]].dtype)
    sums = integer_products(w, a["a"], a["a_zero_point"], a["b"], a["b_zero_point"])
    weights = centered(w, w.value(a["a"]), a["a_zero_point"], wide)
    total = w.op("ReduceSum", weights, w.numbers(-1), keepdims=1)
    none = w.op("Equal", total, w.scalar(0, wide))
    total = w.cast(w.op("Where", none, w.scalar(1, wide), total), torch.float32)
    mean = w.op("Div", w.cast(sums, torch.float32), total)
    factor = float32_scalar(a["b_scale"] if floats else a["b_scale"] / a["scale"])
    real: ir.Value = w.op("Mul", mean, w.scalar(float(factor), torch.float32))
    return real if floats else to_codes(w, real, *_output(w))


def _output(w: Writer) -> tuple[int, int, int, torch.dtype]:
    a = w.arguments
    return a["zero_point"], a["qmin"], a["qmax"], a["dtype"]
