"""Layers with other tensors. They are replaced, not written into, because stages share them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from passes import FusedLayer, Rewriter

__all__ = ["describe_change", "layer_at", "replace_tensors"]


def layer_at(root: nn.Module, path: str) -> Any:
    """The layer at `path`, or the one within the FusedLayer there."""
    module = root.get_submodule(path)
    return module.layer if isinstance(module, FusedLayer) else module


def replace_tensors(rewriter: Rewriter, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put a copy of the layer at `path` there, with `weight` and `bias` in the layer's own type."""
    module = rewriter.graph_module.get_submodule(path)
    layer = layer_at(rewriter.graph_module, path)
    fresh = copy.copy(layer)
    tensors = {"weight": weight, "bias": bias}
    fresh._parameters = {
        name: None if value is None else nn.Parameter(value.to(layer.weight.dtype), False)
        for name, value in tensors.items()
    }
    if isinstance(module, FusedLayer):
        wrapper = copy.copy(module)
        wrapper._modules = {**module._modules, "layer": fresh}
        fresh = wrapper
    rewriter.set_module(path, fresh)


def describe_change(
    path: str,
    *,
    divided: Tensor | None = None,
    moved: Tensor | None = None,
    multiplied: Tensor | None = None,
) -> str:
    """A line for the diff: by what a layer's outputs are divided and moved, its columns scaled."""
    parts = [
        f"{words} {float(torch.amin(factor)):.3g} to {float(torch.amax(factor)):.3g}"
        for words, factor in (
            ("outputs moved by", moved),
            ("outputs divided by", divided),
            ("columns times", multiplied),
        )
        if factor is not None
    ]
    return f"{path}: {', '.join(parts)}"
