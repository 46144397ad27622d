"""Layers without parameters as the functions that they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from passes.infra.stored import overrides_forward

__all__ = ["module_form"]

_Form = tuple[Callable[..., Any], dict[str, Any]]

_POOL = ("kernel_size", "stride", "padding")
_MAX_POOL = (*_POOL, "dilation", "ceil_mode", "return_indices")
_AVG_POOL = (*_POOL, "ceil_mode", "count_include_pad")
_RESIZE = ("size", "scale_factor", "mode", "align_corners")

# The function, and the attributes of the module that are its parameters.
_ATTRIBUTES: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.Sigmoid: (torch.sigmoid, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.SiLU: (F.silu, ()),
    nn.Mish: (F.mish, ()),
    nn.GELU: (F.gelu, ("approximate",)),
    nn.Tanh: (torch.tanh, ()),
    nn.Softplus: (F.softplus, ("beta", "threshold")),
    nn.Softsign: (F.softsign, ()),
    nn.LogSigmoid: (F.logsigmoid, ()),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.CELU: (F.celu, ("alpha",)),
    nn.SELU: (F.selu, ()),
    nn.GLU: (F.glu, ("dim",)),
    nn.Threshold: (F.threshold, ("threshold", "value")),
    nn.Softmax: (F.softmax, ("dim",)),
    nn.LogSoftmax: (F.log_softmax, ("dim",)),
    nn.Flatten: (torch.flatten, ("start_dim", "end_dim")),
    nn.MaxPool1d: (F.max_pool1d, _MAX_POOL),
    nn.MaxPool2d: (F.max_pool2d, _MAX_POOL),
    nn.MaxPool3d: (F.max_pool3d, _MAX_POOL),
    nn.AvgPool1d: (F.avg_pool1d, _AVG_POOL),
    nn.AvgPool2d: (F.avg_pool2d, (*_AVG_POOL, "divisor_override")),
    nn.AvgPool3d: (F.avg_pool3d, (*_AVG_POOL, "divisor_override")),
    nn.AdaptiveAvgPool1d: (F.adaptive_avg_pool1d, ("output_size",)),
    nn.AdaptiveAvgPool2d: (F.adaptive_avg_pool2d, ("output_size",)),
    nn.AdaptiveAvgPool3d: (F.adaptive_avg_pool3d, ("output_size",)),
    nn.AdaptiveMaxPool1d: (F.adaptive_max_pool1d, ("output_size", "return_indices")),
    nn.AdaptiveMaxPool2d: (F.adaptive_max_pool2d, ("output_size", "return_indices")),
    nn.AdaptiveMaxPool3d: (F.adaptive_max_pool3d, ("output_size", "return_indices")),
    nn.Upsample: (F.interpolate, (*_RESIZE, "recompute_scale_factor")),
    nn.UpsamplingNearest2d: (F.interpolate, _RESIZE),
    nn.UpsamplingBilinear2d: (F.interpolate, _RESIZE),
    nn.PixelShuffle: (F.pixel_shuffle, ("upscale_factor",)),
    nn.PixelUnshuffle: (F.pixel_unshuffle, ("downscale_factor",)),
    nn.ChannelShuffle: (F.channel_shuffle, ("groups",)),
}

_PADDING_MODES = {
    "ZeroPad": "constant",
    "ConstantPad": "constant",
    "ReflectionPad": "reflect",
    "ReplicationPad": "replicate",
    "CircularPad": "circular",
}


def module_form(module: nn.Module) -> _Form | None:
    """The function and the keyword arguments of exactly this type of module, or None."""
    if overrides_forward(module):
        return None
    if type(module) in _ATTRIBUTES:
        function, names = _ATTRIBUTES[type(module)]
        return function, {name: getattr(module, name) for name in names}
    if type(module) is nn.Softmax2d:
        return F.softmax, {"dim": -3}
    kind = type(module).__name__[:-2]
    if type(module).__module__ == "torch.nn.modules.padding" and kind in _PADDING_MODES:
        parameters: dict[str, Any] = {"pad": module.padding, "mode": _PADDING_MODES[kind]}
        if kind in ("ZeroPad", "ConstantPad"):
            parameters["value"] = vars(module).get("value", 0.0)
        return F.pad, parameters
    return None
