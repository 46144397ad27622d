"""Tracing a model and comparing the graph with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fxquant.frontend.trace import Traced, trace

__all__ = ["IMAGE", "same", "targets"]

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def same(model: nn.Module, *inputs: Any, fed: int | None = None) -> Traced:
    """Trace, assert that the graph gives what the model gives, return what tracing returned."""
    model.eval()
    traced = trace(model, fed)
    with torch.no_grad():
        want = model(*copy.deepcopy(inputs))
        got = traced.graph_module(*copy.deepcopy(inputs))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    return traced


def targets(traced: Traced) -> list[str]:
    return [str(n.target) for n in traced.graph_module.graph.nodes if n.op == "call_module"]
