"""What fusing leaves behind: one module for layer, residual addition and activation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "FUSIBLE_LAYERS", "FusedLayer", "add_relu"]

FUSIBLE_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
}


class FusedLayer(nn.Module):
    """``activation(layer(x) + residual)`` with an optional quantizer on the layer's weight.

    `layer` is a convolution, a transposed convolution or a linear layer, untouched, so that its
    hyper-parameters stay readable. `weight_quantizer` maps the weight to its quantized image
    (None: the weight as it is).
    """

    def __init__(
        self,
        layer: nn.Module,
        activation: str = "none",
        *,
        weight_quantizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, FUSIBLE_LAYERS):
            raise TypeError(f"cannot fuse into a {type(layer).__name__}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: {sorted(ACTIVATIONS)}")
        self.layer = layer
        self.activation = activation
        self.weight_quantizer = weight_quantizer
        self.has_residual = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(layer(x) + residual)``."""
        y = self._layer_forward(x)
        if residual is not None:
            y = y + residual
        return ACTIVATIONS[self.activation](y)

    def _layer_forward(self, x: Tensor) -> Tensor:
        if self.weight_quantizer is None:
            return cast(Tensor, self.layer(x))
        layer: Any = self.layer
        weight = self.weight_quantizer(layer.weight)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            transposed = getattr(F, f"conv_transpose{weight.dim() - 2}d")
            return cast(
                Tensor,
                transposed(
                    x,
                    weight,
                    layer.bias,
                    layer.stride,
                    layer.padding,
                    layer.output_padding,
                    layer.groups,
                    layer.dilation,
                ),
            )
        return cast(Tensor, layer._conv_forward(x, weight, layer.bias))

    def with_parts(self, **parts: nn.Module) -> FusedLayer:
        """A copy with another `layer` or `weight_quantizer`; all else is shared with this one."""
        new = copy.copy(self)
        # A shallow copy of a module shares its dictionaries; the two must not.
        new._modules = dict(self._modules)
        for name, part in parts.items():
            setattr(new, name, part)
        return new

    @property
    def operation(self) -> str:
        """The name in listings: ``conv2d``, ``conv2d_relu``, ``conv2d_add_relu``."""
        parts = [type(self.layer).__name__.lower()]
        parts += ["add"] if self.has_residual else []
        parts += [self.activation] if self.activation != "none" else []
        return "_".join(parts)

    @property
    def detail(self) -> str:
        """The weight quantizer as listings show it."""
        return str(getattr(self.weight_quantizer, "detail", ""))


def is_depthwise(layer: nn.Module | None) -> bool:
    """Whether it is a convolution that keeps its input channels apart."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return layer.groups == layer.in_channels > 1


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """``relu(a + b)``: a residual addition whose layer could not take it in."""
    return F.relu(torch.add(a, b))
