"""Sums and products of two values, and a batch norm that stands alone."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.export.onnx.codes import centered, dequantized, scaled, to_codes, zero_point_of
from fxquant.export.onnx.writer import MICROSOFT, Writer
from fxquant.integer.rounding import float32_scalar, rescale_factor

__all__ = ["emit_add", "emit_channel_affine", "emit_mul"]


def emit_add(w: Writer, node: fx.Node) -> ir.Value:
    """Exact: both products and the sum apart, as ONNX Runtime's QLinearAdd folds the scales."""
    a = w.arguments
    if not w.options.exact:
        return _pair(w, "Add", "QLinearAdd")
    left = scaled(w, w.value(a["a"]), a["a_zero_point"], rescale_factor(a["a_scale"], a["scale"]))
    right = scaled(w, w.value(a["b"]), a["b_zero_point"], rescale_factor(a["b_scale"], a["scale"]))
    return to_codes(w, w.op("Add", left, right), *_output(w))


def emit_mul(w: Writer, node: fx.Node) -> ir.Value:
    """Exact: the product of the centred codes, which float32 rounds once, then the multiplier."""
    a = w.arguments
    if not w.options.exact:
        return _pair(w, "Mul", "QLinearMul")
    left = centered(w, w.value(a["a"]), a["a_zero_point"], torch.float32)
    right = centered(w, w.value(a["b"]), a["b_zero_point"], torch.float32)
    factor = float32_scalar(a["a_scale"] * a["b_scale"] / a["scale"])
    product = w.op("Mul", left, right)
    return to_codes(w, w.op("Mul", product, w.scalar(float(factor), torch.float32)), *_output(w))


def emit_channel_affine(w: Writer, node: fx.Node) -> ir.Value:
    """``float32(q − z) · m_c + b_c`` along dimension 1."""
    a = w.arguments
    rank = len(w.sizes(a["x"]))
    name = str(a["weight"].target)
    factors = (w.tensor(a["weight"]).double() * a["x_scale"] / a["scale"]).float()
    offsets = (w.tensor(a["bias"]).double() / a["scale"]).float()
    real = centered(w, w.value(a["x"]), a["x_zero_point"], torch.float32)
    real = w.op("Mul", real, w.constant(_along(factors, rank), f"{name}_multiplier"))
    real = w.op("Add", real, w.constant(_along(offsets, rank), f"{name}_offset"))
    return to_codes(w, real, *_output(w))


def _along(values: Tensor, rank: int) -> Tensor:
    return values.reshape([-1] + [1] * (rank - 2))


def _output(w: Writer) -> tuple[int, int, int, torch.dtype]:
    a = w.arguments
    return a["zero_point"], a["qmin"], a["qmax"], a["dtype"]


def _pair(w: Writer, kind: str, fused: str) -> ir.Value:
    """The operator between DQ and Q, or ONNX Runtime's own on codes."""
    a = w.arguments
    dtypes = w.shapes[a["a"]].dtype, w.shapes[a["b"]].dtype
    info = torch.iinfo(a["dtype"])
    whole = (a["qmin"], a["qmax"]) == (info.min, info.max)
    if w.options.operators and whole and {*dtypes, a["dtype"]} == {torch.uint8}:
        operands = []
        for name, dtype in (("a", torch.uint8), ("b", torch.uint8)):
            scale = w.scalar(a[f"{name}_scale"], torch.float32)
            zero = zero_point_of(w, a[f"{name}_zero_point"], dtype)
            operands += [w.value(a[name]), scale, zero]
        output = w.scalar(a["scale"], torch.float32), zero_point_of(w, a["zero_point"], a["dtype"])
        return w.op(fused, *operands, *output, domain=MICROSOFT)
    real = [
        dequantized(w, w.value(a[name]), a[f"{name}_scale"], a[f"{name}_zero_point"], dtype)
        for name, dtype in zip(("a", "b"), dtypes, strict=True)
    ]
    return to_codes(w, w.op(kind, *real), *_output(w), a["scale"])
