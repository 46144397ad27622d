"""Convolutions and linear layers: the fast kernels where they fit, else plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.backends.native.convolution import lower_convolution
from fxquant.backends.native.layer import Layer
from fxquant.backends.native.linear import lower_linear
from fxquant.backends.native.plain_layer import lower_plain
from fxquant.backends.native.planner import Planner
from fxquant.backends.native.values import Value

__all__ = ["lower_layer"]

OPS: Any = torch.ops.fxquant


def lower_layer(planner: Planner, node: fx.Node) -> Value:
    """A convolution, transposed or not, or a linear layer."""
    layer = Layer.of(planner, node)
    x = planner.value(layer.arguments["x"])
    if node.target in (OPS.linear.default, OPS.linear_accumulate.default):
        result = lower_linear(planner, layer, x)
    elif layer.transposed or layer.weight.dim() == 5 or x.tensor.dim() != layer.weight.dim():
        result = None
    else:
        result = lower_convolution(planner, layer, x)
    return result or lower_plain(planner, layer, x)
