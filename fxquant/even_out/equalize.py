"""Cross-layer equalization (Nagel et al., Data-Free Quantization, ICCV 2019, section 4.1).

Two layers with nothing but a ReLU between them can trade scale channel by channel:

    W₁[i] / s_i,  b₁[i] / s_i        W₂[:, i] · s_i        s_i = √(r₁[i] · r₂[i]) / r₂[i]

so that both weights use their range alike. Exact for ReLU and for no activation; ReLU6 is not
scale-equivariant and ends a chain.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.plan.operations import layer_of
from passes import FUSIBLE_LAYERS, FusedLayer
from passes.infra.stored import set_module

__all__ = ["equalizable_pairs", "equalize"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MAX_ROUNDS = 20
_SETTLED = 1e-3


def equalizable_pairs(fused: fx.GraphModule) -> list[tuple[str, str]]:
    """The paths of neighbouring layers that may trade scale, in execution order."""
    pairs = []
    for node in fused.graph.nodes:
        first = layer_of(node, fused)
        if first is None or len(node.users) != 1 or len(node.all_input_nodes) != 1:
            continue
        (user,) = node.users
        second = layer_of(user, fused)
        if second is None or len(user.all_input_nodes) != 1 or type(first) is not type(second):
            continue
        module = fused.get_submodule(str(node.target))
        activation = module.activation if isinstance(module, FusedLayer) else "none"
        if activation in ("none", "relu") and isinstance(first, (*_CONVOLUTIONS, nn.Linear)):
            pairs.append((str(node.target), str(user.target)))
    return pairs


def equalize(fused: fx.GraphModule) -> list[str]:
    """Equalize every pair of the graph until the scales settle; returns the notes.

    Layers are replaced, not written into.
    """
    pairs = equalizable_pairs(fused)
    for path in {path for pair in pairs for path in pair}:
        _replace_layer(fused, path)
    for _ in range(_MAX_ROUNDS):
        change = max((_equalize_pair(fused, *pair) for pair in pairs), default=0.0)
        if change < _SETTLED:
            break
    return [f"cross-layer equalization: {len(pairs)} pairs of layers"]


def _replace_layer(root: fx.GraphModule, path: str) -> None:
    module = root.get_submodule(path)
    layer: Any = module.layer if isinstance(module, FusedLayer) else module
    fresh = copy.copy(layer)
    fresh._parameters = {
        name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in layer._parameters.items()
    }
    if isinstance(module, FusedLayer):
        wrapper = copy.copy(module)
        wrapper._modules = {**module._modules, "layer": fresh}
        set_module(root, path, wrapper)
    else:
        set_module(root, path, fresh)


def _equalize_pair(root: fx.GraphModule, first_path: str, second_path: str) -> float:
    first, second = (_layer(root, path) for path in (first_path, second_path))
    r1 = first.weight.detach().abs().flatten(1).amax(1)
    r2 = _input_channels(second, second.weight.detach().abs())
    usable = (r1 > 0) & (r2 > 0)
    scale = torch.where(usable, (r1 / r2).sqrt(), torch.ones_like(r1))
    shape = (-1, *([1] * (first.weight.dim() - 1)))
    first.weight.data = first.weight.data / scale.view(shape)
    if first.bias is not None:
        first.bias.data = first.bias.data / scale
    second.weight.data = second.weight.data * _per_input(second, scale)
    return float((scale - 1).abs().max())


def _layer(root: fx.GraphModule, path: str) -> Any:
    module = root.get_submodule(path)
    layer = module.layer if isinstance(module, FusedLayer) else module
    assert isinstance(layer, FUSIBLE_LAYERS)
    return layer


def _input_channels(layer: Any, magnitude: Tensor) -> Tensor:
    """The largest weight that reads each input channel, [C_in]."""
    groups = getattr(layer, "groups", 1)
    per_group = magnitude.flatten(2).amax(2) if magnitude.dim() > 2 else magnitude
    return per_group.view(groups, -1, per_group.shape[1]).amax(1).flatten()


def _per_input(layer: Any, scale: Tensor) -> Tensor:
    """`scale` of the input channels laid out to multiply the weight."""
    weight: Tensor = layer.weight
    groups = getattr(layer, "groups", 1)
    rows = scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape[0], -1, *([1] * (weight.dim() - 2)))
