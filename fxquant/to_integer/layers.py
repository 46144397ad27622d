"""Convolutions and linear layers on integers: weights, biases, multipliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.quantizers import WeightQuantizer
from fxquant.spec import QParams
from fxquant.to_integer.conversion import OPS, Conversion
from fxquant.to_integer.grid import Grid
from passes import FusedLayer

__all__ = ["activation_of", "emit_layer", "weight_constants"]


def weight_constants(
    conversion: Conversion,
    path: str,
    layer: Any,
    quantizer: WeightQuantizer,
    qparams: QParams,
    output_scale: Tensor | None = None,
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """A layer's integer weight, its scale (or the one given instead), and its zero point.

    `qparams` is the quantizer's grid, or a coarser one that a bias needs.
    """
    same = torch.equal(qparams.scale, quantizer.qparams.scale)
    codes = (quantizer if same else qparams).quantize(layer.weight.detach())
    weight = conversion.constant(f"{path}.weight", codes)
    scale = conversion.constant(
        f"{path}.weight_scale", qparams.scale if output_scale is None else output_scale
    )
    zero_point = None
    if bool((qparams.zero_point != 0).any()):
        zero_point = conversion.constant(
            f"{path}.weight_zero_point", qparams.zero_point.to(torch.int32)
        )
    return weight, scale, zero_point


def emit_layer(
    conversion: Conversion, node: fx.Node, output: tuple[Any, ...], grid: Grid | None
) -> fx.Node:
    """A convolution or linear layer whose integer result is written as `output` says."""
    path = str(node.target)
    module = conversion.source.get_submodule(path)
    assert isinstance(module, FusedLayer)
    quantizer = module.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    layer: Any = module.layer
    x, *residual = (conversion.integers[source] for source in node.args)  # type: ignore[index]
    # A scale a channel is folded into the weights' scales on both sides of the value.
    finer = torch.ones(1)
    if x.channels is not None:
        repeats = layer.out_channels // layer.in_channels
        finer = (x.channels / x.grid.scale).repeat_interleave(repeats)
    qparams = _room_for_bias(quantizer.qparams, layer.bias, x.grid.scale * finer.double())
    rescaled = per_channel = qparams.scale * finer
    if conversion.output_channels is not None and grid is not None:
        rescaled = per_channel * (grid.scale / conversion.output_channels)
    weight, scale, zero_point = weight_constants(
        conversion, path, layer, quantizer, qparams, rescaled
    )
    bias = None
    if layer.bias is not None:
        step = x.grid.scale * per_channel.double()
        rounded = (layer.bias.detach().double() / step).round()
        bias = conversion.constant(f"{path}.bias", rounded.to(torch.int32))
    extra = tuple(item for value in residual for item in (value.node, *value.grid.input))
    if isinstance(layer, nn.Linear):
        args = (x.node, *x.grid.input, weight, scale, zero_point, bias, *output, *extra)
        return conversion.emit(OPS.linear.default, args, grid)
    geometry = (
        list(layer.stride),
        _padding(layer),
        list(layer.dilation),
        layer.groups,
    )
    common = (x.node, *x.grid.input, weight, scale, zero_point, bias, *geometry)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        args = (*common, list(layer.output_padding), *output, *extra)
        return conversion.emit(OPS.conv_transpose.default, args, grid)
    return conversion.emit(OPS.conv.default, (*common, *output, *extra), grid)


def activation_of(root: nn.Module, node: fx.Node) -> str:
    """The activation that is fused into the layer that `node` calls."""
    module = root.get_submodule(str(node.target))
    return module.activation if isinstance(module, FusedLayer) else "none"


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
