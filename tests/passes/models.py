"""Small models for the tests of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.infra import verify
from tests.passes.checking import float_graph

__all__ = ["annotated", "batch_norm", "image", "make"]

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def make(forward: Callable[..., Any], **members: nn.Module | Tensor) -> nn.Module:
    """A module in eval mode with these members and this `forward(self, x, ...)`."""
    made = type("Made", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        if isinstance(member, nn.Module):
            made.add_module(name, member)
        else:
            made.register_buffer(name, member)
    return made.eval()


def annotated(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """`model` traced, with the tensor infos that a run on `inputs` gives."""
    graph_module = float_graph(model)
    verify.run_and_annotate(graph_module, inputs, name="annotated")
    return graph_module


def batch_norm(channels: int, dims: int = 2, seed: int = 0, **options: Any) -> nn.Module:
    """A batch norm with statistics and parameters as training would leave them."""
    norm = _NORMS[dims](channels, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(channels, generator=generator))
            norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.2)
        if norm.weight is not None:
            norm.weight.copy_(torch.randn(channels, generator=generator))
            norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm.eval()


def image(channels: int = 3, size: int = 8, batch: int = 1, dims: int = 2) -> Tensor:
    """A random image or what it is in 1 or 3 dims."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *[size] * dims, generator=generator)
