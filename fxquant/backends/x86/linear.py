"""Linear layers on torch's kernels, weights prepacked, with what follows them where it fits in.

Two kernels give the same integers. FBGEMM's takes quantized tensors and starts quickly; the raw
operator of oneDNN takes plain codes, writes codes or floats, applies an activation to its
accumulators, and is three times as fast where there is enough to multiply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.backends.x86 import kernels, scripted
from fxquant.backends.x86.layers import float_bias
from fxquant.backends.x86.lowering import Lowered, Lowering
from fxquant.backends.x86.traceable import traced_as
from fxquant.kernels.calls import operator_arguments
from passes import tensor_info

__all__ = ["lower_activated_linear", "lower_linear", "raw_linear"]

OPS: Any = torch.ops.fxquant
Q: Any = torch.ops.quantized
RAW_LINEAR: Any = traced_as(scripted.raw_linear)(torch.ops.onednn.qlinear_pointwise.default)

# Measured on 1 to 197 rows and layers of 192 to 3072 channels: the raw operator starts ten
# microseconds later.
_FEWEST_PRODUCTS = 2**23
_TO_FLOAT = (1.0, 0, torch.float32)
_POST_OPERATIONS: dict[Any, str] = {F.relu: "relu", F.gelu: "gelu", F.silu: "swish"}


def lower_linear(lowering: Lowering, node: fx.Node) -> Lowered:
    """A linear layer; float32 accumulators where nothing quantizes its output."""
    a = operator_arguments(node)
    weight, scale = lowering.tensor(a["weight"]), lowering.tensor(a["weight_scale"])
    assert weight is not None
    assert scale is not None
    zero_point = lowering.tensor(a["weight_zero_point"])
    if a["residual"] is not None:
        return None
    if a["dtype"] == torch.float32:
        if zero_point is not None:
            return None
        return lowering.emit(RAW_LINEAR, *raw_linear(lowering, node, a, _TO_FLOAT))
    relu = a["qmin"] == a["zero_point"] > 0
    low = 0 if relu else a["qmin"]
    if zero_point is None and _products(node, weight) >= _FEWEST_PRODUCTS:
        output = (a["scale"], a["zero_point"], torch.uint8)
        arguments = raw_linear(lowering, node, a, output, "relu" if relu else "none")
        return lowering.clamp_plain(lowering.emit(RAW_LINEAR, *arguments), low, a["qmax"])
    bias = float_bias(lowering.tensor(a["bias"]), scale, a["x_scale"])
    packed = kernels.pack_linear(kernels.quantized_weight(weight, scale, zero_point), bias)
    constant = lowering.attribute(f"{node.name}_packed", packed)
    target = Q.linear_relu.default if relu else Q.linear.default
    lowered = lowering.emit(
        target, lowering.quantized(a["x"]), constant, a["scale"], a["zero_point"]
    )
    return lowering.clamp(lowered, node, low, a["qmax"])


def lower_activated_linear(lowering: Lowering, node: fx.Node) -> Lowered:
    """``quantize(activation(linear(x)))`` in one call, where nothing else reads the floats."""
    output = operator_arguments(node)
    activation = output["x"]
    name = _POST_OPERATIONS.get(activation.target)
    linear = activation.args[0] if name is not None else None
    if not isinstance(linear, fx.Node) or linear.target is not OPS.linear.default:
        return None
    if len(activation.users) > 1 or len(linear.users) > 1 or linear.name in lowering.keep:
        return None
    a = operator_arguments(linear)
    if a["dtype"] != torch.float32 or a["weight_zero_point"] is not None:
        return None
    if a["residual"] is not None:
        return None
    assert name is not None
    lowered = lowering.emit(
        RAW_LINEAR,
        *raw_linear(
            lowering,
            linear,
            a,
            (output["scale"], output["zero_point"], torch.uint8),
            name,
            activation.kwargs.get("approximate", "none") if name == "gelu" else "",
        ),
    )
    return lowering.clamp_plain(lowered, output["qmin"], output["qmax"])


def raw_linear(
    lowering: Lowering,
    node: fx.Node,
    a: Mapping[str, Any],
    output: tuple[float, int, torch.dtype],
    post_operation: str = "none",
    algorithm: str = "",
    weight_scale: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments of oneDNN's operator for the call `node` of a linear layer.

    `output` is the scale and zero point that the accumulators are divided by and moved by, which
    are 1 and 0 for floats, and the type; `weight_scale` stands for the layer's own.
    """
    weight = lowering.tensor(a["weight"])
    scale = lowering.tensor(a["weight_scale"]) if weight_scale is None else weight_scale
    assert weight is not None
    assert scale is not None

    def make() -> dict[str, Any]:
        outputs = weight.shape[0]
        bias = float_bias(lowering.tensor(a["bias"]), scale, a["x_scale"])
        return {
            "packed": torch.ops.onednn.qlinear_prepack(weight.contiguous(), None),
            "scale": scale.expand(outputs).contiguous(),
            "zeros": torch.zeros(outputs, dtype=torch.long),
            **({} if bias is None else {"bias": bias}),
        }

    packed, scales, zeros, *bias = lowering.shared(node.name, make)
    return (
        lowering.plain(a["x"]), a["x_scale"], a["x_zero_point"], packed, scales, zeros,
        bias[0] if bias else None, *output, post_operation, [], algorithm,
    )  # fmt: skip


def _products(node: fx.Node, weight: Tensor) -> int:
    """How many products the layer has on the probe."""
    info = tensor_info(node)
    rows = 1 if info is None else math.prod(info.shape[:-1])
    return rows * weight.numel()
