"""Convolutions and recurrent layers on torch's kernels, weights prepacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.x86 import kernels, recurrent
from fxquant.backends.x86.elementwise import ON_QUANTIZED
from fxquant.backends.x86.lowering import Lowered, Lowering
from fxquant.kernels.calls import operator_arguments
from passes import tensor_info

__all__ = [
    "float_bias",
    "lower_conv",
    "lower_linear_dynamic",
    "lower_recurrent",
    "lower_weight",
    "raw_conv",
]

OPS: Any = torch.ops.fxquant
Q: Any = torch.ops.quantized
RAW_CONV: Any = torch.ops.onednn.qconv_pointwise.default


def float_bias(bias: Tensor | None, weight_scale: Tensor, x_scale: float) -> Tensor | None:
    """A layer's integer bias in real numbers, as the kernels take it."""
    return None if bias is None else (bias.double() * (weight_scale.double() * x_scale)).float()


def lower_conv(lowering: Lowering, node: fx.Node) -> Lowered:
    """A convolution, with residual and ReLU where it has them; float32 accumulators too."""
    a = operator_arguments(node)
    weight, scale = lowering.tensor(a["weight"]), lowering.tensor(a["weight_scale"])
    assert weight is not None
    assert scale is not None
    zero_point = lowering.tensor(a["weight_zero_point"])
    dimensions = weight.dim() - 2
    residual, to_float = a["residual"], a["dtype"] == torch.float32
    depthwise = a["groups"] > 1 and weight.shape[1] == 1
    if zero_point is not None and (depthwise or residual is not None or to_float):
        return None
    if residual is not None and dimensions != 2:
        return None
    x = lowering.quantized(a["x"])
    bias = float_bias(lowering.tensor(a["bias"]), scale, a["x_scale"])
    geometry = [list(a[key]) for key in ("stride", "padding", "dilation")]
    if to_float:
        return raw_conv(lowering, node, a, scale, (1.0, 0, torch.float32))
    packed = kernels.pack_conv(
        kernels.quantized_weight(weight, scale, zero_point),
        bias,
        geometry,
        a["groups"],
        engine_name="onednn" if zero_point is None else "fbgemm",
    )
    constant = lowering.attribute(f"{node.name}_packed", packed)
    output = (constant, a["scale"], a["zero_point"])
    relu = a["qmin"] == a["zero_point"] > 0
    if residual is not None:
        target = kernels.conv_add_relu if relu else kernels.conv_add
        accumulator = lowering.quantized(residual)
        if _is_needed_again(residual, node):
            accumulator = lowering.emit(torch.clone, accumulator)
        lowered = lowering.emit(target, x, accumulator, *output)
    else:
        name = f"conv{dimensions}d_relu" if relu else f"conv{dimensions}d"
        lowered = lowering.emit(
            getattr(getattr(Q, name), "new", None) or getattr(Q, name).default, x, *output
        )
    return lowering.clamp(lowered, node, 0 if relu else a["qmin"], a["qmax"])


def _is_needed_again(residual: fx.Node, node: fx.Node) -> bool:
    """Whether more than `node` needs the memory of `residual`, which the kernel writes over."""
    readers = list(residual.users)
    views = residual.target in ON_QUANTIZED or any(r.target in ON_QUANTIZED for r in readers)
    return views or residual is node.args[0] or any(node < reader for reader in readers)


def raw_conv(
    lowering: Lowering,
    node: fx.Node,
    a: dict[str, Any],
    weight_scale: Tensor,
    output: tuple[float, int, torch.dtype],
) -> fx.Node | None:
    """oneDNN's operator on plain codes for the call `node` of a convolution.

    `output` is the scale and zero point of codes, or 1 and 0 for floats, and the type. None where
    the operator does not have the convolution.
    """
    weight = lowering.tensor(a["weight"])
    assert weight is not None
    if weight.dim() == 3:
        return None
    scale = weight_scale.expand(weight.shape[0]).contiguous()
    geometry = [list(a[key]) for key in ("stride", "padding", "dilation")]
    packed = torch.ops.onednn.qconv_prepack(
        weight, scale, a["x_scale"], a["x_zero_point"], *geometry, a["groups"], None
    )
    zeros = torch.zeros(weight.shape[0], dtype=torch.long)
    constants = [
        lowering.attribute(f"{node.name}_{key}", value)
        for key, value in {"packed": packed, "scale": scale, "zeros": zeros}.items()
    ]
    bias = float_bias(lowering.tensor(a["bias"]), scale, a["x_scale"])
    bias_node = None if bias is None else lowering.attribute(f"{node.name}_bias", bias)
    return lowering.emit(
        RAW_CONV, lowering.plain(a["x"]), a["x_scale"], a["x_zero_point"], *constants, bias_node,
        *geometry, a["groups"], *output, "none", [], "",
    )  # fmt: skip


def lower_weight(lowering: Lowering, node: fx.Node) -> Lowered:
    """A weight that is computed with in float is dequantized once, here."""
    target: Any = node.target
    args = [lowering.tensor(a) if isinstance(a, fx.Node) else a for a in node.args]
    return lowering.attribute(node.name, target(*args))


def lower_linear_dynamic(lowering: Lowering, node: fx.Node) -> Lowered:
    """A linear layer that quantizes its input at run time."""
    a = operator_arguments(node)
    weight, scale = lowering.tensor(a["weight"]), lowering.tensor(a["weight_scale"])
    assert weight is not None
    assert scale is not None
    info = tensor_info(a["x"])
    if info is None or len(info.shape) < 2:
        return None
    quantized = kernels.quantized_weight(weight, scale, None)
    packed = kernels.pack_linear(quantized, lowering.tensor(a["bias"]))
    constant = lowering.attribute(f"{node.name}_packed", packed)
    return lowering.emit(Q.linear_dynamic.default, lowering.other(a["x"]), constant)


def lower_recurrent(lowering: Lowering, node: fx.Node) -> Lowered:
    """An LSTM or GRU that quantizes its inputs at run time."""
    a = operator_arguments(node)
    weights, scales, biases = (
        [tensor for n in a[key] if (tensor := lowering.tensor(n)) is not None]
        for key in ("weights", "scales", "biases")
    )
    constants = [
        lowering.attribute(f"{node.name}_cell{index}", cell)
        for index, cell in enumerate(recurrent.pack_cells(weights, scales, biases))
    ]
    return lowering.emit(
        recurrent.lstm if node.target is OPS.lstm_dynamic.default else recurrent.gru,
        lowering.other(a["x"]),
        [lowering.other(value) for value in a["hx"]],
        constants,
        weights[1].shape[1],
        a["num_layers"],
        a["bidirectional"],
        a["batch_first"],
    )
