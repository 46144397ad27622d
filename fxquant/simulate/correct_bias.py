"""Bias correction: what rounding the weights does to the mean of a layer's output, undone.

    E[y_q] − E[y] = (W_q − W) · E[x]          b' = b − (W_q − W) · E[x]

with E[x] of each input channel, measured on the calibration data (Nagel et al., Data-Free
Quantization, ICCV 2019, section 4.2, with empirical instead of analytical expectations). Near
the border of an image, where padding takes part, the shift is an approximation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.plan.operations import Kind, classify
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from passes import FusedLayer

__all__ = ["InputMeans", "correct_bias"]


class InputMeans:
    """The mean of each input channel of every layer with a quantized weight, streamed."""

    def __init__(self, simulated: fx.GraphModule) -> None:
        self.layers = {
            name: module
            for name, module in simulated.named_modules()
            if isinstance(module, FusedLayer)
            and isinstance(module.weight_quantizer, WeightQuantizer)
        }
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block, every forward pass of the graph is counted."""
        handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mean(self, name: str) -> Tensor:
        """E[x] of the layer's input channels, float64 [C]."""
        return self._sums[name] / self._counts[name]

    def _hook(self, name: str) -> Any:
        layer = self.layers[name].layer

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if isinstance(layer, nn.Linear):
                dims = list(range(x.dim() - 1))
                count = x.numel() // max(1, x.shape[-1])
            else:
                x = x if x.dim() == layer.weight.dim() else x.unsqueeze(0)
                dims = [0, *range(2, x.dim())]
                count = x.numel() // max(1, x.shape[1])
            total = x.sum(dims).double()
            self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
            self._counts[name] = self._counts.get(name, 0) + count

        return hook


def correct_bias(simulated: fx.GraphModule, means: InputMeans) -> list[str]:
    """Give every layer whose weight is quantized its corrected bias; returns the notes.

    Layers are replaced, not written into: the stages before share their tensors. A layer whose
    output is divided by its norm keeps its bias: padded tokens have no output at all, and the
    smallest bias would make unit vectors of them.
    """
    normalized = _normalized_layers(simulated)
    layers = {name: fused for name, fused in means.layers.items() if name not in normalized}
    for name, fused in layers.items():
        layer: Any = fused.layer
        assert fused.weight_quantizer is not None
        weight = layer.weight.detach().double()
        error = fused.weight_quantizer(layer.weight.detach()).double() - weight
        shift = _shift(layer, error, means.mean(name))
        corrected = copy.copy(layer)
        corrected._parameters = dict(layer._parameters)
        before = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
        corrected._parameters["bias"] = nn.Parameter(
            (before - shift).to(layer.weight.dtype), requires_grad=False
        )
        fused.layer = corrected
    return [f"bias correction: {len(layers)} layers"]


def _normalized_layers(simulated: fx.GraphModule) -> set[str]:
    """The paths of layers whose output goes, behind movement and quantizers, to F.normalize."""
    found = set()
    behind: set[fx.Node] = set()
    for node in reversed(simulated.graph.nodes):
        if any(user.target is F.normalize or user in behind for user in node.users):
            called = simulated.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(called, FusedLayer):
                found.add(str(node.target))
            elif isinstance(called, ActivationQuantizer) or (
                called is None and classify(node, simulated).kind is Kind.MOVE
            ):
                behind.add(node)
    return found


def _shift(layer: Any, error: Tensor, mean: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return error @ mean
    taps = error.flatten(2).sum(2)
    groups = layer.groups
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # Each output position sees one tap in `stride` of each dimension: the mean over phases.
        stride = 1
        for step in layer.stride:
            stride *= step
        per_group = taps.view(groups, -1, taps.shape[1]) * mean.view(groups, -1, 1)
        return per_group.sum(1).flatten() / stride
    per_group = taps.view(groups, -1, taps.shape[1]) * mean.view(groups, 1, -1)
    return per_group.sum(2).flatten()
