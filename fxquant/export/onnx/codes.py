"""Between real values and codes: what every operator of the other files is made of."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.export.onnx.weights import stored_weight, weight_zeros
from fxquant.export.onnx.writer import Writer
from fxquant.integer.rounding import float32_scalar

__all__ = [
    "centered",
    "clipped_long",
    "dequantized",
    "emit_dequantize",
    "emit_dequantize_weight",
    "emit_lookup",
    "emit_quantize",
    "scaled",
    "to_codes",
    "zero_point_of",
]

_CLIPPED = (torch.uint8, torch.int8)


def zero_point_of(w: Writer, value: int, dtype: torch.dtype) -> ir.Value:
    """A zero point as a constant of the type of its codes."""
    return w.scalar(value, dtype)


def dequantized(
    w: Writer, x: ir.Value, scale: float | Tensor, zero_point: int, dtype: torch.dtype
) -> ir.Value:
    """``float32(q − z) · float32(s)``: DequantizeLinear of the whole tensor."""
    factor = float32_scalar(scale) if isinstance(scale, float) else scale
    scale_value = w.constant(factor, f"float32_{float(factor):.9g}")
    return w.op("DequantizeLinear", x, scale_value, zero_point_of(w, zero_point, dtype))


def centered(w: Writer, x: ir.Value, zero_point: int, dtype: torch.dtype) -> ir.Value:
    """``q − z`` in a wider type."""
    wide = w.cast(x, dtype)
    return w.op("Sub", wide, w.scalar(zero_point, dtype)) if zero_point else wide


def clipped_long(w: Writer, x: ir.Value, low: int | Tensor, high: int | Tensor) -> ir.Value:
    """Int64 within bounds: by comparisons, which are exact.

    ONNX Runtime's Clip, Min and Max of int64 compare floats: 2^31 passes a bound of 2^31 − 1.
    """
    for bound, kind in ((low, "Less"), (high, "Greater")):
        if isinstance(bound, int) and abs(bound) < 2**24:
            continue
        limit = w.constant(torch.as_tensor(bound), f"int64_{kind}")
        x = w.op("Where", w.op(kind, x, limit), limit, x)
    small = [
        w.scalar(bound, torch.int64) if isinstance(bound, int) and abs(bound) < 2**24 else None
        for bound in (low, high)
    ]
    return w.op("Clip", x, *small) if any(small) else x


def scaled(w: Writer, x: ir.Value, zero_point: int, factor: Tensor) -> ir.Value:
    """``float32(q − z) · m`` in operators that no runtime fuses into one of its own roundings."""
    real = centered(w, x, zero_point, torch.float32)
    return w.op("Mul", real, w.constant(factor, f"float32_{float(factor):.9g}"))


def to_codes(
    w: Writer,
    real: ir.Value,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> ir.Value:
    """``clamp(round_half_even(real / s) + z, qmin, qmax)``: QuantizeLinear.

    With ``s = 1``, the default, it is exact. 8-bit codes that have tighter bounds than their type
    are clipped behind it, so that a layer in front of it stays fused; 16-bit ones before it.
    """
    info = torch.iinfo(dtype)
    tight = qmin > info.min or qmax < info.max
    if tight and dtype not in _CLIPPED:
        low, high = (w.scalar((q - zero_point) * scale, torch.float32) for q in (qmin, qmax))
        real = w.op("Clip", real, low, high)
    codes: ir.Value = w.op(
        "QuantizeLinear",
        real,
        w.constant(float32_scalar(scale), f"float32_{float(float32_scalar(scale)):.9g}"),
        zero_point_of(w, zero_point, dtype),
    )
    if tight and dtype in _CLIPPED:
        codes = w.op("Clip", codes, w.scalar(qmin, dtype), w.scalar(qmax, dtype))
    return codes


def emit_quantize(w: Writer, node: fx.Node) -> ir.Value:
    """``Mul(1/s)``, then QuantizeLinear of scale 1: dividing by s rounds elsewhere."""
    a = w.arguments
    output = a["zero_point"], a["qmin"], a["qmax"], a["dtype"]
    real = w.value(a["x"])
    if not w.options.exact and a["dtype"] in _CLIPPED:
        return to_codes(w, real, *output, a["scale"])
    inverse = float32_scalar(1.0) / float32_scalar(a["scale"])
    real = w.op("Mul", real, w.constant(inverse, f"float32_{float(inverse):.9g}"))
    return to_codes(w, real, *output)


def emit_dequantize(w: Writer, node: fx.Node) -> ir.Value:
    """DequantizeLinear computes the same product."""
    a = w.arguments
    dtype = w.shapes[a["q"]].dtype
    return dequantized(w, w.value(a["q"]), a["scale"], a["zero_point"], dtype)


def emit_dequantize_weight(w: Writer, node: fx.Node) -> ir.Value:
    """DequantizeLinear of a weight, with a scale for each index of one axis."""
    a = w.arguments
    weight, scale = w.tensor(a["weight"]), w.tensor(a["weight_scale"]).float()
    shift = None if a["weight_zero_point"] is None else w.tensor(a["weight_zero_point"])
    name = str(a["weight"].target)
    one = scale.numel() == 1
    inputs = [
        stored_weight(w, weight, name),
        w.constant(scale.reshape([] if one else [-1]), f"{name}_s"),
    ]
    zeros = weight_zeros(w, shift)
    if zeros is not None:
        zeros = zeros.expand(scale.numel()).reshape([] if one else [-1])
        inputs.append(w.constant(zeros.contiguous(), f"{name}_z"))
    return w.op("DequantizeLinear", *inputs, axis=None if one else a["axis"] % weight.dim())


def emit_lookup(w: Writer, node: fx.Node) -> ir.Value:
    """Gather from the table."""
    a = w.arguments
    indices = w.cast(w.value(a["x"]), torch.int32)
    table = w.constant(w.tensor(a["table"]), str(a["table"].target))
    return w.op("Gather", table, indices)
