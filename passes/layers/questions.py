"""Questions that several passes ask about convolutions and linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from passes.infra.stored import module_of, overrides_forward
from passes.layers.fused_layer import FUSIBLE_LAYERS, FusedLayer

__all__ = [
    "TRANSPOSED",
    "activation_of",
    "find_layer",
    "only_user",
    "why_not_layer",
    "why_not_plain",
]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def find_layer(node: Any) -> nn.Module | None:
    """The convolution, transposed convolution or linear layer that `node` calls, or None."""
    module = module_of(node)
    return module if isinstance(module, FUSIBLE_LAYERS) else None


def activation_of(node: fx.Node) -> str:
    """The activation that is fused into the layer that `node` calls, or "none"."""
    module = module_of(node)
    return module.activation if isinstance(module, FusedLayer) else "none"


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, or None where none or several do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def why_not_plain(layer: nn.Module) -> str | None:
    """Why the layer does more than its class of torch says, or None where it does just that.

    Only a plain layer is described by its weight, bias and hyper-parameters, which is what
    folding, fusing and lowering work on.
    """
    kind = type(layer).__name__
    base: Any = next((base for base in FUSIBLE_LAYERS if isinstance(layer, base)), None)
    if base is None:
        return f"{kind} is no convolution or linear layer"
    if parametrize.is_parametrized(layer):
        return "its parameters are parametrized"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    if overrides_forward(layer):
        return f"{kind} overrides the forward of {base.__name__}"
    if not isinstance(layer.weight, Tensor) or not layer.weight.is_floating_point():
        return "its weight is not a floating point tensor"
    return None


def why_not_layer(node: fx.Node, allowed: set[fx.Node], sites: dict[str, int]) -> str | None:
    """Why the layer that `node` calls cannot take in what surrounds it, or None where it can.

    `allowed` are the nodes that a pass may change, `sites` is what `call_sites` gives.
    """
    layer = find_layer(node)
    if layer is None:
        return f"{node.name} is no convolution or linear layer"
    if node not in allowed:
        return f"{node.name} was not selected"
    if sites[str(node.target)] > 1:
        return f"{node.name} is called at {sites[str(node.target)]} places"
    if len(node.args) != 1 or node.kwargs:
        return f"{node.name} is not called in canonical form"
    reason = why_not_plain(layer)
    return f"{node.name}: {reason}" if reason else None
