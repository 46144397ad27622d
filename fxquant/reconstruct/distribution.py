"""Distribution correction: float inputs moved towards what the network was trained on.

A few hundred images do not have the distribution of the training set, which batch norms
remember (Liu et al., PD-Quant, CVPR 2023, section 3.3). Folded into its layer, a batch norm
with weight γ and bias β says that the layer's output has in each channel

    mean β     standard deviation |γ| √(σ² / (σ² + ε))

over the training set, so that the fused graph can be asked without its batch norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from fxquant.reconstruct.parallel import Share
from fxquant.simulate.sweep import seeing
from passes import FusedLayer
from passes.infra.stored import module_of

__all__ = ["Correction", "Statistics", "batch_norm_statistics", "correct_inputs"]

Statistics = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Correction:
    """How inputs are corrected: steps of Adam, its learning rate, and the statistics' weight."""

    steps: int
    learning_rate: float
    weight: float


def batch_norm_statistics(float_graph: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation, [C] each, of the normalized output of layers, by their path.

    Of convolutions that one batch norm alone reads. A batch norm that changes nothing was
    folded by whoever saved the weights and remembers nothing.
    """
    found = {}
    for node in float_graph.graph.nodes:
        norm = module_of(node)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
            continue
        source = node.all_input_nodes[0]
        layer = module_of(source)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or len(source.users) > 1:
            continue
        assert norm.running_mean is not None
        variance = norm.running_var
        gamma = norm.weight if norm.affine else torch.ones_like(variance)
        beta = norm.bias if norm.affine else torch.zeros_like(variance)
        fresh = bool((norm.running_mean == 0).all()) and bool((variance == 1).all())
        if fresh:
            continue
        deviation = gamma.detach().abs() * (variance / (variance + norm.eps)).sqrt()
        found[str(source.target)] = (beta.detach().clone(), deviation)
    return found


def correct_inputs(
    block: fx.GraphModule,
    values: Mapping[str, Tensor],
    names: Sequence[str],
    statistics: Statistics,
    correction: Correction,
    share: Share,
) -> dict[str, Tensor]:
    """A block's float inputs moved by Adam so that its layers' outputs fit their statistics.

    Minimizes ``weight · Σ_layers (‖mean − β‖² + ‖deviation − γ‖²) / C + mean (x̂ − x)² / mean x²``
    over the values of `names`, of a chunk of images of all processes together.
    """
    moved = {name: values[name].clone() for name in names}
    adam = torch.optim.Adam(list(moved.values()), lr=correction.learning_rate)
    outputs: dict[str, Tensor] = {}
    sees = {_bare_path(block, path): partial(outputs.__setitem__, path) for path in statistics}
    sizes = {name: values[name].square().sum().reshape(1) for name in names}
    share.sum(list(sizes.values()))
    with seeing(block, outputs=sees):
        for _ in range(correction.steps):
            for value in moved.values():
                value.requires_grad_()
            loss = _statistics_loss(
                block, {**values, **moved}, outputs, statistics, correction, share
            )
            for name, value in moved.items():
                loss = loss + (value - values[name]).square().sum() / sizes[name].clamp_min(1e-12)
            gradients = torch.autograd.grad(loss.sum(), list(moved.values()))
            for value, gradient in zip(moved.values(), gradients, strict=True):
                value.requires_grad_(False)
                value.grad = gradient
            adam.step()
    return moved


def _statistics_loss(
    block: fx.GraphModule,
    values: Mapping[str, Tensor],
    outputs: dict[str, Tensor],
    statistics: Statistics,
    correction: Correction,
    share: Share,
) -> Tensor:
    """A value whose gradient is that of the loss over all processes' images."""
    inputs = [values[node.name] for node in block.graph.nodes if node.op == "placeholder"]
    if inputs[0].shape[0]:
        block(*inputs)
    sums = []
    for path in statistics:
        if not inputs[0].shape[0]:
            channels = len(statistics[path][0])
            outputs[path] = torch.zeros(0, channels, 1, 1)
        z = outputs[path]
        dims = [0, *range(2, z.dim())]
        sums += [z.sum(dims), z.square().sum(dims), torch.full((1,), z.numel() / z.shape[1])]
    totals = [part.detach().clone().to(sums[0].device) for part in sums]
    share.sum(totals)
    loss = sums[0].new_zeros(1)
    for index, (mean, deviation) in enumerate(statistics.values()):
        first, second, count = totals[3 * index : 3 * index + 3]
        found = (first / count).requires_grad_()
        square = (second / count).requires_grad_()
        with torch.enable_grad():
            spread = (square - found.square()).clamp_min(1e-12).sqrt()
            distance = (found - mean.to(found)).square() + (spread - deviation.to(found)).square()
            slopes = torch.autograd.grad(distance.mean(), [found, square])
        for part, slope in zip(sums[3 * index : 3 * index + 2], slopes, strict=True):
            loss = loss + correction.weight * (part * slope).sum() / count
    return loss


def _bare_path(block: fx.GraphModule, path: str) -> str:
    return f"{path}.layer" if isinstance(block.get_submodule(path), FusedLayer) else path
