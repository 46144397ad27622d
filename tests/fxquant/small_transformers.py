"""The smallest transformers: torchvision's, and one with causal attention."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

import fxquant
from fxquant.compiled import CompiledModel
from fxquant.recipe import Recipe

__all__ = ["Causal", "compiled_vit", "images", "swin", "vit"]


def images(count: int = 4, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@functools.cache
def vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=10,
    )
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


@functools.cache
def swin() -> nn.Module:
    torch.manual_seed(0)
    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=10,
    )
    return model.eval()


class Causal(nn.Module):
    """A block of a language model on features: causal attention and an MLP, pre-norm."""

    def __init__(self, width: int = 32, heads: int = 2, length: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.ones(length, length).tril().bool())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (p.view(n, t, self.heads, c // self.heads).transpose(1, 2) for p in parts)
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)
        mask: Any = self.mask
        p = F.softmax(scores.masked_fill(~mask, float("-inf")), -1)
        x = x + self.out((p @ v).transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@functools.cache
def compiled_vit(
    recipe: str, changes: tuple[tuple[str, Any], ...] = (), target: str = "reference"
) -> CompiledModel:
    """The small ViT, compiled once for all tests that only look at it."""
    changed = Recipe.named(recipe).replace(dict(changes))
    return fxquant.compile(vit(), changed, calibration=images(8).split(4), target=target)
