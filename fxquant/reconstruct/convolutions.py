"""Convolutions of a block in training: in bfloat16, channels last, where the CPU is fast at it.

What is learned is whether a weight goes up or down, by errors of 2- to 4-bit grids; a bfloat16
product is off by 2^-8, and the sums are float32 (oneDNN accumulates so). Only the convolution's
product is bfloat16: the bias, additions, quantizers and losses see float32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from passes import FusedLayer

__all__ = ["has_fast_bfloat16", "use_bfloat16"]

_FEWEST_CHANNELS = 8  # below, the conversions cost more than the product


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the CPU multiplies bfloat16 (AVX-512 BF16 or AMX)."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def use_bfloat16(module: nn.Module) -> None:
    """Let the dense 2-d convolutions of fused layers multiply in bfloat16, in place.

    Their modules are replaced; what the original graph holds stays as it is.
    """
    for part in module.modules():
        if not isinstance(part, FusedLayer) or type(part.layer) is not nn.Conv2d:
            continue
        layer = part.layer
        if layer.groups == 1 and layer.in_channels >= _FEWEST_CHANNELS:
            fast = copy.copy(layer)
            fast.__class__ = _BFloat16Conv2d
            part.layer = fast


class _BFloat16Conv2d(nn.Conv2d):
    def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Tensor:
        half = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
        y: Tensor = super()._conv_forward(input.to(**half), weight.to(**half), None).float()
        return y if bias is None else y + bias.view(-1, 1, 1)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, self.weight, self.bias)
        return y
