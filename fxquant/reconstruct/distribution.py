"""Distribution correction: float inputs moved towards what the network was trained on.

A few hundred images do not have the distribution of the training set, which batch norms
remember (Liu et al., PD-Quant, CVPR 2023, section 3.3): the mean and the deviation of what they
read. In the fused graph a batch norm is part of its layer; its statistics undo it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from fxquant.simulate.sweep import seeing
from passes import FusedLayer
from passes.infra.stored import module_of

__all__ = ["Correction", "NormStatistics", "batch_norm_statistics", "correct_inputs"]

_EPSILON = 1e-6  # of a variance, so that its root has a slope; the official code's


@dataclass(frozen=True)
class Correction:
    """How inputs are corrected: steps of Adam, its learning rate, and the statistics' weight."""

    steps: int
    learning_rate: float
    weight: float


@dataclass(frozen=True)
class NormStatistics:
    """What a batch norm remembers of its input, and how its output becomes that input again.

    Attributes:
        mean, deviation: float32[C], of the batch norm's input over the training set.
        shift, ratio: float32[C], `input = (output - shift) * ratio + mean`. A channel that the
            batch norm scales by 0 cannot be undone: its ratio is 0, and so is its weight.
    """

    mean: Tensor
    deviation: Tensor
    shift: Tensor
    ratio: Tensor

    def distance(self, output: Tensor) -> Tensor:
        """Of each image's statistics from these, squared, summed over images and channels.

        Args:
            output: float32[N, C, ...], of the layer that the batch norm was folded into.
        """
        ratio = self.ratio.to(output)
        centred = (output.flatten(2) - self.shift.to(output)[:, None]) * ratio[:, None]
        variance = centred.var(2, correction=min(1, centred.shape[2] - 1))
        spread = (variance + _EPSILON).sqrt() - self.deviation.to(output)
        return (centred.mean(2).square() + spread.square())[:, ratio != 0].sum()


def batch_norm_statistics(float_graph: fx.GraphModule) -> dict[str, NormStatistics]:
    """The statistics of batch norms, by the path of the layer that they follow.

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
        fresh = bool((norm.running_mean == 0).all()) and bool((variance == 1).all())
        if fresh:
            continue
        gamma = norm.weight.detach() if norm.affine else torch.ones_like(variance)
        beta = norm.bias.detach() if norm.affine else torch.zeros_like(variance)
        deviation = (variance + norm.eps).sqrt()
        ratio = torch.where(gamma == 0, torch.zeros_like(gamma), deviation / gamma)
        mean = norm.running_mean.detach().clone()
        found[str(source.target)] = NormStatistics(mean, deviation, beta.clone(), ratio)
    return found


def correct_inputs(
    block: fx.GraphModule,
    values: Mapping[str, Tensor],
    names: Sequence[str],
    statistics: Mapping[str, NormStatistics],
    correction: Correction,
) -> dict[str, Tensor]:
    """A block's float inputs moved by Adam so that its layers' outputs fit their statistics.

    Minimizes, as the official code does, the mean over images of

        Σ_layers ‖mean - μ‖² + ‖deviation - σ‖²  +  Σ_channels mean (x̂ - x)² / weight

    over the values of `names`. Every image has a mean and a deviation of its own.
    """
    moved = {name: values[name].clone() for name in names}
    images = len(next(iter(moved.values())))
    if not images:
        return moved
    adam = torch.optim.Adam(list(moved.values()), lr=correction.learning_rate)
    outputs: dict[str, Tensor] = {}
    sees = {_bare_path(block, path): partial(outputs.__setitem__, path) for path in statistics}
    with seeing(block, outputs=sees):
        for _ in range(correction.steps):
            for value in moved.values():
                value.requires_grad_()
            given = {**values, **moved}
            block(*(given[node.name] for node in block.graph.nodes if node.op == "placeholder"))
            away = [norm.distance(outputs[path]) for path, norm in statistics.items()]
            loss = torch.stack(away).sum() / images
            for name, value in moved.items():
                change = (value - values[name]).square().sum(1).mean()
                loss = loss + change / correction.weight
            gradients = torch.autograd.grad(loss, list(moved.values()))
            for value, gradient in zip(moved.values(), gradients, strict=True):
                value.requires_grad_(False)
                value.grad = gradient
            adam.step()
    return moved


def _bare_path(block: fx.GraphModule, path: str) -> str:
    return f"{path}.layer" if isinstance(block.get_submodule(path), FusedLayer) else path
