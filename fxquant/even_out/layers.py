"""Layers of the fused graph by their paths, and what became of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from passes import Rewriter
from passes.layers.replace import bare_layer, replace_layer, with_tensors

__all__ = ["describe_change", "layer_at", "replace_tensors"]


def layer_at(root: nn.Module, path: str) -> Any:
    """The layer at `path`, or the one within the FusedLayer there."""
    return bare_layer(root.get_submodule(path))


def replace_tensors(rewriter: Rewriter, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Let the layer at `path` hold `weight` and `bias`; whoever shares the old one keeps that."""
    layer = layer_at(rewriter.graph_module, path)
    replace_layer(rewriter, path, with_tensors(layer, weight, bias))


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
