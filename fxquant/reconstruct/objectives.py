"""How far a block's output is from its float target: errors, Fisher weights, predictions.

Convolutional blocks: the squared error, summed over channels, its mean over everything else
(BRECQ and the methods after it). With Fisher weights each squared error is multiplied by the
squared gradient of the network's loss, KL(float prediction || prediction), at the block's output
(BRECQ, equation 10), of every image.

Blocks of transformers, whose last layer is linear over tokens: the gradients of single images
are noise there (a residual stream passes every error to every later block), and plain squared
errors are ruled by a few outlier channels, which is how such a reconstruction collapses at four
bits. The weights are the squared gradients averaged over 128 images, one for each position and
channel, and half of each is a plain mean:  w = (1 + F / mean F) / 2. (The averaging is that of
APHQ-ViT, the regularization of AdaLog's and FIMA-Q's damped forms; the half is ours.)

Weights have the mean 1, so that λ keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.plan.operations import layer_of
from fxquant.reconstruct.caches import Rows
from fxquant.reconstruct.parallel import Share

__all__ = [
    "average_fisher",
    "block_error",
    "channel_dim",
    "is_token_block",
    "prediction_error",
    "run_rest",
    "scaled_fisher",
    "squared_gradient",
]


def channel_dim(block: fx.GraphModule, dims: int) -> int:
    """The dimension of a block's output that holds channels: the last one behind a linear layer."""
    return dims - 1 if _ends_linear(block) or dims < 2 else 1


def is_token_block(block: fx.GraphModule, dims: int) -> bool:
    """Whether the output is one vector for each token, as in transformers."""
    return _ends_linear(block) and dims > 2


def block_error(y: Tensor, target: Tensor, channels: int, weights: Tensor | None = None) -> Tensor:
    """The squared error summed over the images and channels, its mean over the positions.

    `weights` broadcasts against the output. Divide by the number of images.
    """
    error = (y - target).square()
    if weights is not None:
        error = error * weights
    positions = y[0].numel() // max(1, y.shape[channels]) if y.dim() > 1 else 1
    return error.sum() / positions


def prediction_error(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(float || quantized) of the softened predictions, summed over everything but classes.

    Classes are the last dimension, or the second of a map [N, C, H, W]. PD-Quant, equation 8.
    Divide by the number of images.
    """
    classes = 1 if logits.dim() == 4 else -1
    return F.kl_div(
        F.log_softmax(logits / temperature, dim=classes),
        F.log_softmax(target / temperature, dim=classes),
        reduction="sum",
        log_target=True,
    )


def run_rest(rest: fx.GraphModule, y: Tensor, position: int, others: Sequence[Tensor]) -> Tensor:
    """The rest of the network on a block's output, its argument at `position`."""
    return cast(Tensor, rest(*others[:position], y, *others[position:]))


def squared_gradient(
    rest: fx.GraphModule, y: Tensor, position: int, others: Sequence[Tensor], target: Tensor
) -> Tensor:
    """The squared gradient of every image's KL(float || quantized) at a block's output."""
    y = y.detach().requires_grad_()
    error = prediction_error(run_rest(rest, y, position, others), target, 1.0)
    (gradient,) = torch.autograd.grad(error, y)
    return gradient.square()


def average_fisher(total: Tensor) -> Tensor:
    """Weights of a token block from the sum of squared gradients: (1 + F / mean F) / 2."""
    mean = total.mean()
    if not bool(mean > 0):
        return torch.ones_like(total)
    return (1 + total / mean) / 2


def scaled_fisher(rows: Rows, images: int, share: Share, chunk: int) -> Rows:
    """Squared gradients of every image divided by their mean over all, in place."""
    total = torch.zeros(2, dtype=torch.float64)
    parts = [slice(first, min(first + chunk, images)) for first in range(0, images, chunk)]
    for part in parts:
        values = rows.take(part)
        total += torch.tensor([float(values.double().sum()), values.numel()])
    share.sum([total])
    mean = float(total[0] / total[1].clamp_min(1))
    for part in parts:
        values = rows.take(part)
        rows.write(part.start, values / mean if mean > 0 else torch.ones_like(values))
    return rows


def _ends_linear(block: fx.GraphModule) -> bool:
    layers = (layer_of(node, block) for node in reversed(block.graph.nodes))
    return isinstance(next((layer for layer in layers if layer is not None), None), nn.Linear)
