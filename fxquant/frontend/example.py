"""An input that a model runs on, guessed from its first layer: for recipes that observe nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.frontend.inputs import parameters
from fxquant.frontend.prepare import check_mode, unwrap

__all__ = ["guess_example"]

_SIDES = (224, 64, 32, 28, 299, 16, 8)


def guess_example(model: nn.Module) -> Tensor | None:
    """Seeded noise that `model` runs on, or None where its first layer tells no shape.

    Two samples of vectors or sequences, one image. None as well where forward needs several inputs.
    Raises ModelError for a model in training mode, which running would change.
    """
    model = unwrap(model)
    check_mode(model)
    needed = [p for p in parameters(model) if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(needed) > 1:
        return None
    random = torch.Generator().manual_seed(0)
    for shape in _shapes(model):
        example = torch.randn(*shape, generator=random)
        try:
            with torch.no_grad():
                model(example)
        except Exception:
            continue
        return example
    return None


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    for layer in model.modules():
        first: Any = layer
        if isinstance(layer, nn.Linear):
            return [(2, first.in_features), (2, 4, first.in_features)]
        if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            return [(4, 2, first.input_size), (2, first.input_size)]
        if isinstance(layer, nn.modules.conv._ConvNd):
            sizes = len(first.kernel_size)
            return [(1, first.in_channels, *[side] * sizes) for side in _SIDES]
    return []
