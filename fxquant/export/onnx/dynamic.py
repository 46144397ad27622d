"""Linear layers whose input is quantized at run time: float in, float out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.export.onnx.weights import stored_weight, weight_zero_point
from fxquant.export.onnx.writer import Writer
from fxquant.integer.dynamic import SMALLEST_SCALE

__all__ = ["DynamicWeight", "emit_linear_dynamic"]

_DOUBLE = torch.float64


@dataclass(frozen=True)
class DynamicWeight:
    """A weight [O, K] whose input's grid follows from the input's extremes.

    DynamicQuantizeLinear chooses another zero point than FBGEMM's rules in places, and divides by
    the scale: at most a step of the input. Exact, these rules are written out in float64.
    """

    stored: ir.Value  # [K, O]
    scale: ir.Value
    bias: ir.Value | None

    @classmethod
    def of(cls, w: Writer, weight: Any, weight_scale: Any, bias: Any) -> DynamicWeight:
        """From the nodes of its constants."""
        name, scale = str(weight.target), w.tensor(weight_scale).float()
        # float32(s_x · s_w) is rounded once, from float64.
        scale = scale.double() if w.options.exact else scale
        return cls(
            stored_weight(w, w.tensor(weight).t().contiguous(), f"{name}_transposed"),
            w.constant(scale, f"{name}_scale"),
            None if bias is None else w.value(bias),
        )

    def apply(self, w: Writer, x: ir.Value) -> ir.Value:
        """``float32(Σ (q_x − z_x) · q_w) · float32(s_x · s_w) + b``: MatMulInteger."""
        if w.options.exact:
            codes, x_scale, zero = _chosen(w, x)
            factor = w.cast(w.op("Mul", w.cast(x_scale, _DOUBLE), self.scale), torch.float32)
        else:
            codes, x_scale, zero = w.ops("DynamicQuantizeLinear", 3, x)
            factor = w.op("Mul", x_scale, self.scale)
        products = w.op("MatMulInteger", codes, self.stored, zero, weight_zero_point(w))
        sums = w.cast(products, torch.float32)
        y = w.op("Mul", sums, factor)
        return y if self.bias is None else w.op("Add", y, self.bias)


def emit_linear_dynamic(w: Writer, node: fx.Node) -> ir.Value:
    """A product with codes that are made when the model runs."""
    a = w.arguments
    weight = DynamicWeight.of(w, a["weight"], a["weight_scale"], a["bias"])
    return weight.apply(w, w.value(a["x"]))


def _chosen(w: Writer, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes, scale (float32) and zero point (uint8): `fxquant.integer.dynamic.choose_qparams`."""
    zero, top = w.scalar(0.0, _DOUBLE), w.scalar(255.0, _DOUBLE)
    low = w.op("Min", w.cast(w.op("ReduceMin", x, keepdims=0), _DOUBLE), zero)
    high = w.op("Max", w.cast(w.op("ReduceMax", x, keepdims=0), _DOUBLE), zero)
    scale = w.op("Div", w.op("Sub", high, low), top)
    # An inverse beyond float32 is no scale either; all of them are far below the smallest.
    inverse = w.op("Div", w.scalar(1.0, _DOUBLE), w.cast(w.cast(scale, torch.float32), _DOUBLE))
    largest = w.scalar(torch.finfo(torch.float32).max, _DOUBLE)
    fits = w.op("LessOrEqual", inverse, largest)
    scale = w.op("Where", fits, scale, w.scalar(0.1, _DOUBLE))
    low, high, scale = _widened(w, low, high, scale)
    from_low = w.op("Div", w.op("Neg", low), scale)
    steps = w.op("Div", high, scale)
    from_high = w.op("Sub", top, steps)
    nearer = w.op("Less", w.op("Abs", from_low), w.op("Add", top, w.op("Abs", steps)))
    shift = w.op("Round", w.op("Clip", w.op("Where", nearer, from_low, from_high), zero, top))
    single = w.cast(scale, torch.float32)
    reciprocal = w.op("Div", w.scalar(1.0, torch.float32), single)
    real = w.op("Round", w.op("Mul", x, reciprocal))
    codes = w.op("Add", real, w.cast(shift, torch.float32))
    bounds = w.scalar(0.0, torch.float32), w.scalar(255.0, torch.float32)
    byte = w.cast(w.op("Clip", codes, *bounds), torch.uint8)
    return byte, single, w.cast(shift, torch.uint8)


def _widened(
    w: Writer, low: ir.Value, high: ir.Value, scale: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """A scale below the smallest becomes the smallest, and the bounds grow with it."""
    zero = w.scalar(0.0, _DOUBLE)
    smallest = w.scalar(float(SMALLEST_SCALE), torch.float32)
    small = w.op("Less", scale, w.cast(smallest, _DOUBLE))
    amplifier = w.op("Div", smallest, w.cast(scale, torch.float32))
    reach = w.cast(w.op("Mul", smallest, w.scalar(255.0, torch.float32)), _DOUBLE)

    def grown(bound: ir.Value) -> ir.Value:
        return w.cast(w.op("Mul", w.cast(bound, torch.float32), amplifier), _DOUBLE)

    at_low, at_high = w.op("Equal", low, zero), w.op("Equal", high, zero)
    new_high = w.op("Where", at_high, zero, grown(high))
    new_high = w.op("Where", at_low, reach, new_high)
    new_low = w.op("Where", at_low, zero, grown(low))
    lowest = w.op("Neg", reach)
    new_low = w.op("Where", w.op("And", at_high, w.op("Not", at_low)), lowest, new_low)
    return (
        w.op("Where", small, new_low, low),
        w.op("Where", small, new_high, high),
        w.op("Where", small, w.cast(smallest, _DOUBLE), scale),
    )
