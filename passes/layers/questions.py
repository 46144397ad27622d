"""Questions that several passes ask about convolutions and linear layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from passes.layers.fused_layer import FUSIBLE_LAYERS

__all__ = [
    "TRANSPOSED",
    "call_sites",
    "find_layer",
    "module_of",
    "only_user",
    "why_not_layer",
    "why_not_plain",
    "with_tensors",
]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def module_of(node: Any) -> nn.Module | None:
    """The module that `node` calls; None where it is not a call of a module."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def find_layer(node: Any) -> nn.Module | None:
    """The convolution, transposed convolution or linear layer that `node` calls, or None."""
    module = module_of(node)
    return module if isinstance(module, FUSIBLE_LAYERS) else None


def call_sites(graph: fx.Graph) -> dict[str, int]:
    """How many nodes call the module at each path."""
    sites: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            sites[str(node.target)] = sites.get(str(node.target), 0) + 1
    return sites


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
    if type(layer).forward is not base.forward or getattr(
        type(layer), "_conv_forward", None
    ) is not getattr(base, "_conv_forward", None):
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


def with_tensors(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of `layer` that holds `weight` and `bias`; `layer` stays as it is.

    Both are cast to the dtype of the weight that they replace.
    """
    old: Any = layer
    dtype = old.weight.dtype
    replaced: dict[int, Any] = {id(old.weight): _parameter(weight, dtype, old.weight)}
    if old.bias is not None:
        replaced[id(old.bias)] = old.bias
    new = copy.deepcopy(layer, replaced)
    new.register_parameter("bias", None if bias is None else _parameter(bias, dtype, old.weight))
    return new


def _parameter(value: Tensor, dtype: torch.dtype, like: Tensor) -> nn.Parameter:
    # A bias that was not touched is already in the right dtype and stays the same tensor.
    if isinstance(value, nn.Parameter) and value.dtype == dtype:
        return value
    return nn.Parameter(value.detach().to(dtype), requires_grad=like.requires_grad)
