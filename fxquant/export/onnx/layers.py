"""Convolutions and linear layers.

Four forms, of which the first that holds is taken:

    operator    QLinearConv, QGemm: one node. Exact with neutral scales x = y = 1, w = m
    QDQ         DQ(x) → Conv(DQ(w), DQ(b)) → Q: runtimes make the same operator of it
    carried     DQ(x, 1) → Conv(DQ(w, 1), DQ(b, 1)) → Mul(m) → Add(residual) → Q(1): float sums of
                integers, exact below 2^24 in any order
    wide        integer sums → Add(b) → Cast → Mul(m) → Add(residual) → Q(1)

Weights stay behind DQ in the carried form: a float initializer would be multiplied by m when a
runtime loads it, and the sums would be no integers any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.export.onnx.codes import dequantized, to_codes, zero_point_of
from fxquant.export.onnx.sums import integer_sums, windows
from fxquant.export.onnx.weights import stored_weight, weight_zeros
from fxquant.export.onnx.writer import MICROSOFT, Writer
from fxquant.integer.bounds import FLOAT32_LIMIT, checked_bound, shifted_weight, weight_reach
from fxquant.integer.rounding import channel_factors, rescale_factor

__all__ = ["emit_conv", "emit_conv_transpose", "emit_linear"]


@dataclass
class _Layer:
    """A call of conv, conv_transpose or linear, its constants at hand.

    `kind` is the ONNX operator on floats. Gemm reads rows, [rows, K]; MatMul reads any rank.
    """

    w: Writer
    kind: str
    x: ir.Value
    a: dict[str, Any]

    def __post_init__(self) -> None:
        w, a = self.w, self.a
        self.weight = w.tensor(a["weight"])
        self.name = str(a["weight"].target)
        self.scale = w.tensor(a["weight_scale"])
        self.shift = None if a["weight_zero_point"] is None else w.tensor(a["weight_zero_point"])
        self.bias = None if a["bias"] is None else w.tensor(a["bias"])
        self.transposed = self.kind == "ConvTranspose"
        self.channels = self.weight.shape[1 if self.transposed else 0]
        if self.transposed:
            self.channels *= a["groups"]
        self.codes = w.shapes[a["x"]].dtype
        self.floats = a["dtype"] == torch.float32

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Of the operator in every form."""
        if self.kind == "MatMul":
            return {}
        return {"transB": 1} if self.kind == "Gemm" else windows(self.a)

    @cached_property
    def carried(self) -> bool:
        """Whether float32 holds every sum, with the bias."""
        if self.codes == torch.int16:
            return False
        options = {"transposed": self.transposed, "groups": self.a.get("groups", 1)}
        shifted = shifted_weight(self.weight, self.shift, **options)
        reach = weight_reach(shifted, **options)
        z = self.a["x_zero_point"]
        bound = checked_bound(self.kind, self.codes, z, reach, self.bias)
        return bound.total < FLOAT32_LIMIT

    def factors(self, scale: float | None) -> Tensor:
        """One multiplier for each output channel: `channel_factors`."""
        found = channel_factors(self.a["x_scale"], self.scale, scale)
        return found.expand(self.channels).contiguous()

    def along(self, values: Tensor, name: str) -> ir.Value:
        """A constant for each output channel, broadcast along them."""
        rank = 2 if self.kind == "Gemm" else self.weight.dim()
        shape = [-1] + [1] * (rank - 2)
        return self.w.constant(values.reshape(shape), f"{self.name}_{name}")

    def weight_value(self) -> ir.Value:
        if self.kind == "MatMul":
            return stored_weight(self.w, self.weight.t().contiguous(), f"{self.name}_transposed")
        return stored_weight(self.w, self.weight, self.name)

    def bias_value(self) -> ir.Value | None:
        if self.bias is None:
            return None
        return self.w.constant(self.bias, str(self.a["bias"].target))

    # -- forms -------------------------------------------------------------------------

    def operator(self, exact: bool) -> ir.Value:
        """QLinearConv or QGemm."""
        w, a = self.w, self.a
        one = w.scalar(1.0, torch.float32)
        factors = self.factors(a["scale"]) if exact else self.scale.float()
        if not exact and factors.numel() == 1:
            factors = factors.expand(self.channels).contiguous()
        x_scale = one if exact else w.scalar(a["x_scale"], torch.float32)
        y_scale = one if exact else w.scalar(a["scale"], torch.float32)
        no_shift = weight_zeros(w, torch.zeros(self.channels))
        assert no_shift is not None
        x = (self.x, x_scale, zero_point_of(w, a["x_zero_point"], self.codes))
        y = (y_scale, zero_point_of(w, a["zero_point"], a["dtype"]))
        weight = (
            self.weight_value(),
            w.constant(factors, f"{self.name}_scale"),
            w.constant(no_shift, f"{self.name}_zero"),
        )
        bias = self.bias_value()
        if self.kind == "Gemm":
            codes = w.op("QGemm", *x, *weight, bias, *y, domain=MICROSOFT, **self.attributes)
        else:
            codes = w.op("QLinearConv", *x, *weight, *y, bias, **self.attributes)
        return self.clipped(codes)

    def clipped(self, codes: ir.Value) -> ir.Value:
        """The bounds of the codes behind an operator that saturates at its type's."""
        a, info = self.a, torch.iinfo(self.a["dtype"])
        if (a["qmin"], a["qmax"]) == (info.min, info.max):
            return codes
        bounds = (self.w.scalar(a[name], a["dtype"]) for name in ("qmin", "qmax"))
        return self.w.op("Clip", codes, *bounds)

    def pairs(self, exact: bool) -> ir.Value:
        """Between DequantizeLinear and QuantizeLinear, with the residual before the latter."""
        w, a = self.w, self.a
        factors = self.factors(a["scale"] if exact else None)
        x = dequantized(w, self.x, 1.0 if exact else a["x_scale"], a["x_zero_point"], self.codes)
        weight_scale = factors if exact else self.scale.float().expand(self.channels).contiguous()
        real = self.float_layer(x, weight_scale, factors)
        if self.floats:
            return real
        if a.get("residual") is not None:
            real = w.op("Add", real, self.residual(a["residual_scale"]))
        # A ReLU whose zero point is the least code is what saturation does anyway.
        output = a["zero_point"], a["qmin"], a["qmax"], a["dtype"]
        return to_codes(w, real, *output, 1.0 if exact else a["scale"])

    def carry(self) -> ir.Value:
        """Float sums of integers, multiplied once."""
        w, a = self.w, self.a
        x = dequantized(w, self.x, 1.0, a["x_zero_point"], self.codes)
        ones = torch.ones(self.channels)
        return self.finished(self.float_layer(x, ones, ones))

    def wide(self) -> ir.Value:
        """Integer sums, rounded to float32 once, multiplied once."""
        if self.transposed:
            raise self.w.refusal("its sums reach 2^24, and ONNX has no integer form of it")
        sums = integer_sums(
            self.w,
            "ConvInteger" if self.kind == "Conv" else "MatMulInteger",
            self.x,
            self.codes,
            self.a["x_zero_point"],
            self.weight,
            self.shift,
            self.name,
            self.attributes,
        )
        if self.bias is not None:
            dtype = torch.int64 if self.codes == torch.int16 else torch.int32
            sums = self.w.op("Add", sums, self.along(self.bias.to(dtype), "bias"))
        return self.finished(self.w.cast(sums, torch.float32))

    def finished(self, real: ir.Value) -> ir.Value:
        """``real · m``, plus the residual, as codes."""
        w, a = self.w, self.a
        factors = self.factors(None if self.floats else a["scale"])
        real = w.op("Mul", real, self.along(factors, "multiplier"))
        if self.floats:
            return real
        if a.get("residual") is not None:
            real = w.op("Add", real, self.residual(None))
        return to_codes(w, real, a["zero_point"], a["qmin"], a["qmax"], a["dtype"])

    def residual(self, scale: float | None) -> ir.Value:
        """Without a scale ``float32(q_r − z_r) · float32(s_r / s_y)``."""
        w, a = self.w, self.a
        r, dtype = w.value(a["residual"]), w.shapes[a["residual"]].dtype
        if self.kind == "Gemm":
            r = w.reshape(r, [-1, self.channels])
        if scale is not None:
            return dequantized(w, r, scale, a["residual_zero_point"], dtype)
        factor = rescale_factor(a["residual_scale"], a["scale"])
        return dequantized(w, r, factor, a["residual_zero_point"], dtype)

    def float_layer(self, x: ir.Value, weight_scale: Tensor, bias_scale: Tensor) -> ir.Value:
        """The operator on dequantized operands."""
        w, axis = self.w, int(self.transposed or self.kind == "MatMul")
        scale = weight_scale
        if self.transposed and self.a["groups"] > 1:
            # One scale for each output of a group: they have to be the same in every group.
            grouped = weight_scale.reshape(self.a["groups"], -1)
            if not bool((grouped == grouped[:1]).all()):
                raise w.refusal("groups whose weights have scales of their own")
            scale = grouped[0].contiguous()
        inputs = [self.weight_value(), w.constant(scale, f"{self.name}_scale")]
        zeros = weight_zeros(w, self.shift)
        if zeros is not None:
            zeros = zeros.expand(scale.shape).contiguous()
            inputs.append(w.constant(zeros, f"{self.name}_zero"))
        operands = [x, w.op("DequantizeLinear", *inputs, axis=axis)]
        bias = self.bias_value()
        if bias is not None:
            bias_factors = w.constant(bias_scale, f"{self.name}_bias_scale")
            operands.append(w.op("DequantizeLinear", bias, bias_factors, axis=0))
        if self.kind == "MatMul":
            y = w.op("MatMul", *operands[:2])
            return y if bias is None else w.op("Add", y, operands[2])
        return w.op(self.kind, *operands, **self.attributes)

    def best(self) -> ir.Value:
        """The form that holds what the options promise."""
        options = self.w.options
        plain = self.a.get("residual") is None and self.shift is None and not self.transposed
        eight = torch.int16 not in (self.codes, self.a["dtype"])
        if plain and eight and not self.floats:
            if options.operators:
                return self.operator(options.exact)
            return self.pairs(options.exact)
        if not options.exact and not options.operators:
            return self.pairs(False)
        if self.floats or not self.carried:
            return self.wide() if not self.transposed else self.carry()
        return self.carry()


def emit_conv(w: Writer, node: fx.Node) -> ir.Value:
    """A convolution of one to three dimensions, with a batch."""
    return _batched(w, node, "Conv")


def emit_conv_transpose(w: Writer, node: fx.Node) -> ir.Value:
    """A transposed convolution; runtimes know it on floats alone."""
    return _batched(w, node, "ConvTranspose")


def _batched(w: Writer, node: fx.Node, kind: str) -> ir.Value:
    a = w.arguments
    if len(w.sizes(a["x"])) != w.tensor(a["weight"]).dim():
        raise w.refusal("its input has no batch")
    return _Layer(w, kind, w.value(a["x"]), a).best()


def emit_linear(w: Writer, node: fx.Node) -> ir.Value:
    """A linear layer over the last dimension.

    On rows it is Gemm. On other ranks MatMul and Add between DQ and Q, which OpenVINO loads; exact
    and on codes, where ONNX Runtime has forms for rows only, Reshape makes rows.
    """
    a = w.arguments
    x = w.value(a["x"])
    rank = len(w.sizes(a["x"]))
    portable = not (w.options.exact or w.options.operators)
    if portable and rank != 2:
        return _Layer(w, "MatMul", x, a).best()
    if rank != 2:
        x = w.reshape(x, [-1, w.sizes(a["x"])[-1]])
    y = _Layer(w, "Gemm", x, a).best()
    return y if rank == 2 else w.reshaped(y, node)
