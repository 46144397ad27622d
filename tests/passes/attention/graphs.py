"""What the tests of `DecomposeAttention` share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from passes import Canonicalize, DecomposeAttention, EliminateNoops, FoldConstants, Pass
from tests.passes.checking import Checked, check

__all__ = ["QKV", "Inputs", "decompose"]

FIRST: tuple[Pass, ...] = (Canonicalize(), EliminateNoops(), FoldConstants())


def decompose(model: nn.Module | Callable[..., Any], *inputs: Tensor, **options: Any) -> Checked:
    if not isinstance(model, nn.Module):
        model = Inputs(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    return check(DecomposeAttention(), model.eval(), inputs, first=FIRST, **options)


class Inputs(nn.Module):
    """A model whose forward is `function` of its one to four inputs."""

    def __new__(cls, function: Callable[..., Any]) -> Any:
        count = function.__code__.co_argcount
        return super().__new__((Inputs, One, Two, Three, Four)[count])

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function


class One(Inputs):
    def forward(self, a: Tensor) -> Any:
        return self.function(a)


class Two(Inputs):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.function(a, b)


class Three(Inputs):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.function(a, b, c)


class Four(Inputs):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        return self.function(a, b, c, d)


QKV = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 6)
"""Queries [N, heads, T, d], keys [N, heads, S, d] and values [N, heads, S, e]."""
