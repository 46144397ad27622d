"""Bias correction: what rounding the weights does to the mean of a layer's output, undone.

    E[y_q] − E[y] = (W_q − W) · E[x]

with E[x] of each input channel, measured on the calibration data (Nagel et al., Data-Free
Quantization, ICCV 2019, section 4.2, with empirical instead of analytical expectations). Near
the border of an image, where padding takes part, the shift is an approximation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.plan.operations import Kind, classify
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.simulate.sweep import See
from passes import Decline, FusedLayer, InsertQuantDequant, Pass, PassResult, Rewriter
from passes.infra.stored import module_of
from passes.infra.walk import reached
from passes.layers.replace import replace_layer, with_tensors

__all__ = ["CorrectBias", "InputMeans", "normalized_layers"]


class InputMeans:
    """The mean of each input channel of every layer with a quantized weight, streamed.

    `inputs` are the functions that see what the layers read, by path, for `calibrate`.
    """

    def __init__(self, simulated: fx.GraphModule) -> None:
        self.layers: dict[str, Any] = {
            name: module.layer
            for name, module in simulated.named_modules()
            if isinstance(module, FusedLayer)
            and isinstance(module.weight_quantizer, WeightQuantizer)
        }
        self.inputs: dict[str, See] = {name: self._seer(name) for name in self.layers}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def mean(self, name: str) -> Tensor:
        """E[x] of the layer's input channels, float64 [C]."""
        return self._sums[name] / self._counts[name]

    def _seer(self, name: str) -> See:
        layer = self.layers[name]

        def see(x: Tensor) -> None:
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

        return see


class CorrectBias(Pass):
    """Undo what rounding the weights does to the mean of a layer's output.

        before                            after
        y = W_q x + b                     y = W_q x + b'        b' = b − (W_q − W) · E[x]

    with E[x] from `means`. Not exact: the outputs come closer to those of the float network.

    Declines where the output is divided by its norm: padded tokens have no output at all, and
    the smallest bias would make unit vectors of them. A layer that is not the one whose inputs
    were measured is left alone.
    """

    exact = False
    after = (InsertQuantDequant,)

    def __init__(self, means: InputMeans) -> None:
        self.means = means

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Give every measured layer its corrected bias; the notes count them."""
        rewriter = Rewriter(graph_module)
        normalized = normalized_layers(graph_module)
        declines, changes = [], []
        for name, layer in self.means.layers.items():
            fused = graph_module.get_submodule(name)
            if not isinstance(fused, FusedLayer) or fused.layer is not layer:
                continue
            if name in normalized:
                reason = "its output is divided by its norm: it keeps its bias"
                declines.append(Decline.at(normalized[name], reason))
                continue
            assert fused.weight_quantizer is not None
            weight = layer.weight.detach().double()
            error = fused.weight_quantizer(layer.weight.detach()).double() - weight
            shift = _shift(layer, error, self.means.mean(name))
            before = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
            replace_layer(rewriter, name, with_tensors(layer, layer.weight, before - shift))
            low, high = float((-shift).min()), float((-shift).max())
            changes.append(f"{name}: bias moved by {low:.3g} to {high:.3g}")
        notes = (f"bias correction: {len(changes)} layers",)
        return PassResult(rewriter.finish(), tuple(declines), notes, tuple(changes))


def normalized_layers(simulated: fx.GraphModule) -> dict[str, fx.Node]:
    """The layers whose output goes, behind movement and quantizers, to F.normalize, by path."""

    def reads(node: fx.Node) -> list[fx.Node]:
        moves = isinstance(module_of(node), ActivationQuantizer) or (
            node.op != "call_module" and classify(node, simulated).kind is Kind.MOVE
        )
        return node.all_input_nodes if moves or node.target is F.normalize else []

    divisions = [node for node in simulated.graph.nodes if node.target is F.normalize]
    behind = reached(divisions, reads)
    return {str(node.target): node for node in behind if isinstance(module_of(node), FusedLayer)}


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
