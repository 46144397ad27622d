"""What passes ask about layers."""

from __future__ import annotations

import torch
from torch import nn

from passes.layers.questions import why_not_plain


def test_a_layer_with_integer_weights_is_not_plain() -> None:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int32), requires_grad=False)
    assert why_not_plain(layer) == "its weight is not a floating point tensor"
