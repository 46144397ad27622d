"""The smallest networks that have what a test is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.compiled import CompiledModel

__all__ = ["Residual", "compiled", "conv_net", "images", "module"]


class Residual(nn.Module):
    """Convolution, batch norm, a residual block, a pool and a linear head: 3×8×8 to 4 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            assert self.norm.running_mean is not None
            assert self.norm.running_var is not None
            self.norm.running_mean.copy_(torch.randn(8) * 0.2)
            self.norm.running_var.copy_(torch.rand(8) + 0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.conv1(x))
        x = F.relu(x + self.conv2(y))
        return self.head(x.mean((2, 3)))


def conv_net(**options: Any) -> nn.Sequential:
    """One convolution, with `options`, and a ReLU: 3×8×8 to 4×8×8."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, **options), nn.ReLU()).eval()


def images(count: int = 4, channels: int = 3, size: int = 8) -> Tensor:
    """Random images, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=generator)


def module(forward: Callable[..., Any], **members: Any) -> nn.Module:
    """A module in eval mode with these members and this ``forward(self, ...)``."""
    made = type("Made", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
            made.register_buffer(name, member)
        else:
            setattr(made, name, member)
    return made.eval()


def compiled(
    model: nn.Module | None = None,
    changes: dict[str, Any] | None = None,
    *,
    calibration: Any = None,
    recipe: str = "w8a8",
    **options: Any,
) -> CompiledModel:
    """`model` (a `Residual`) compiled with a named recipe, changed."""
    return fxquant.compile(
        Residual() if model is None else model,
        fxquant.Recipe.named(recipe).replace(changes or {}),
        calibration=images() if calibration is None else calibration,
        **options,
    )
