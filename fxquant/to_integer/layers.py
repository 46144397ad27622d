"""Convolutions and linear layers on integers: weights, biases, multipliers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.simulate.quantizers import WeightQuantizer, without_zero_point
from fxquant.spec import QParams
from fxquant.to_integer.conversion import OPS, Conversion, Integers
from fxquant.to_integer.grid import Grid
from passes import FusedLayer
from passes.layers.questions import activation_of

__all__ = [
    "LayerIntegers",
    "activate",
    "emit_layer",
    "geometry",
    "layer_integers",
    "output_bounds",
    "weight_constants",
]


@dataclass(frozen=True)
class LayerIntegers:
    """What a layer computes with on integers.

    `scale` is what the kernels are told about the weights, float32 [C] or [1]: their own scale
    with the scales of single channels of the input and the output folded in.
    """

    layer: Any
    x: Integers
    weight: fx.Node
    zero_point: fx.Node | None
    bias: fx.Node | None
    scale: Tensor


def weight_constants(
    conversion: Conversion, path: str, layer: Any, quantizer: WeightQuantizer, qparams: QParams
) -> tuple[fx.Node, fx.Node | None]:
    """A layer's integer weight, and its zero point where it needs one.

    `qparams` is the quantizer's grid, or a coarser one that a bias needs.
    """
    same = torch.equal(qparams.scale, quantizer.qparams.scale)
    codes = (quantizer if same else qparams).quantize(layer.weight.detach())
    integers, zero_point = without_zero_point(codes, qparams)
    weight = conversion.constant(f"{path}.weight", integers)
    if zero_point is None:
        return weight, None
    return weight, conversion.constant(f"{path}.weight_zero_point", zero_point)


def layer_integers(conversion: Conversion, node: fx.Node, grid: Grid | None) -> LayerIntegers:
    """The constants of the layer that `node` calls, whose result lies on `grid`."""
    path = str(node.target)
    module = conversion.source.get_submodule(path)
    assert isinstance(module, FusedLayer)
    quantizer = module.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    layer: Any = module.layer
    x = conversion.integers[node.args[0]]  # type: ignore[index]
    # A scale a channel is folded into the weights' scales on both sides of the value.
    finer = torch.ones(1)
    if x.channels is not None:
        repeats = layer.out_channels // layer.in_channels
        finer = (x.channels / x.grid.scale).repeat_interleave(repeats)
    qparams = _room_for_bias(quantizer.qparams, layer.bias, x.grid.scale * finer.double())
    rescaled = per_channel = qparams.scale * finer
    if conversion.output_channels is not None and grid is not None:
        rescaled = per_channel * (grid.scale / conversion.output_channels)
    weight, zero_point = weight_constants(conversion, path, layer, quantizer, qparams)
    bias = None
    if layer.bias is not None:
        step = x.grid.scale * per_channel.double()
        rounded = (layer.bias.detach().double() / step).round()
        bias = conversion.constant(f"{path}.bias", rounded.to(torch.int32))
        bias.meta["channel_scale"] = step.expand(len(rounded))
    return LayerIntegers(layer, x, weight, zero_point, bias, rescaled)


def emit_layer(
    conversion: Conversion, node: fx.Node, output: tuple[Any, ...], grid: Grid | None
) -> fx.Node:
    """A convolution or linear layer whose integer result is written as `output` says."""
    found = layer_integers(conversion, node, grid)
    layer, x = found.layer, found.x
    residual = [conversion.integers[source] for source in node.args[1:]]  # type: ignore[index]
    scale = conversion.constant(f"{node.target}.weight_scale", found.scale)
    common = (x.node, *x.grid.input, found.weight, scale, found.zero_point, found.bias)
    extra = tuple(item for value in residual for item in (value.node, *value.grid.input))
    if isinstance(layer, nn.Linear):
        return conversion.emit(OPS.linear.default, (*common, *output, *extra), grid)
    common = (*common, *geometry(layer))
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        args = (*common, list(layer.output_padding), *output, *extra)
        return conversion.emit(OPS.conv_transpose.default, args, grid)
    return conversion.emit(OPS.conv.default, (*common, *output, *extra), grid)


def geometry(layer: Any) -> tuple[Any, ...]:
    """A convolution's stride, padding, dilation and groups as operators take them."""
    return list(layer.stride), _padding(layer), list(layer.dilation), layer.groups


def activate(conversion: Conversion, y: fx.Node, activation: str) -> fx.Node:
    """A fused layer's activation as an operation of its own, on floats."""
    functions: dict[str, Any] = {"relu": F.relu, "relu6": F.relu6}
    if activation == "none":
        return y
    return conversion.emit(
        functions[activation], (y,), None, f"{conversion.current.name}_{activation}"
    )


def output_bounds(conversion: Conversion, node: fx.Node, grid: Grid) -> tuple[int, int]:
    """The codes between which the activation that is fused into a layer keeps its result."""
    activation = activation_of(node)
    low = max(grid.qmin, grid.zero_point) if activation in ("relu", "relu6") else grid.qmin
    high = min(grid.qmax, grid.code(6.0)) if activation == "relu6" else grid.qmax
    return low, high


def _room_for_bias(qparams: QParams, bias: Tensor | None, x_scale: Tensor) -> QParams:
    """Weight scales under which the bias fits into half of an int32.

    A channel whose weights are next to nothing has a scale so small that its bias would leave
    the accumulator; a coarser scale costs it less than 2^-22 of its output.
    """
    if bias is None:
        return qparams
    smallest = (bias.detach().double().abs() / (x_scale * 2.0**30)).float()
    if qparams.scale.numel() == 1:
        smallest = smallest.amax().reshape(1)
    return replace(qparams, scale=torch.maximum(qparams.scale, smallest))


def _padding(layer: Any) -> list[int]:
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size)
    if layer.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return list(layer.padding)
