"""The operations that attention is made of and that torch has no single call for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["masked_softmax", "scaled_matmul", "softmax_numerators", "weighted_mean"]


def scaled_matmul(a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """``torch.matmul(a, b) * scale``: the scores of queries [..., T, d] and keys [..., d, S].

    Broadcasts like `torch.matmul`. Traced by torch.fx, it is one node. Source: Vaswani et al.
    2017, section 3.2.1, where the scale is 1/√d.
    """
    # A Proxy of torch.fx takes the whole call this way, whatever name it was imported by.
    if has_torch_function((a, b)):
        return handle_torch_function(scaled_matmul, (a, b), a, b, scale=scale)
    return torch.matmul(a, b) * scale


def masked_softmax(x: Tensor, mask: Tensor, *, dim: int = -1) -> Tensor:
    """Softmax over the positions along `dim` where the bool `mask` is True; 0 elsewhere.

    `mask` is broadcast against `x` (float, any shape). A row without any True position is all 0
    and not NaN. Traced by torch.fx, it is one node.
    """
    if has_torch_function((x, mask)):
        return handle_torch_function(masked_softmax, (x, mask), x, mask, dim=dim)
    probabilities = F.softmax(x.masked_fill(~mask, float("-inf")), dim=dim)
    return probabilities.masked_fill(~mask.any(dim=dim, keepdim=True), 0.0)


def softmax_numerators(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``exp(x − max x)`` along the last dimension: a softmax that is not divided by its sum.

    Within [0, 1], the largest exactly 1. Where the bool `mask` is False, 0. Traced by torch.fx,
    it is one node.
    """
    tensors = (x,) if mask is None else (x, mask)
    if has_torch_function(tensors):
        return handle_torch_function(softmax_numerators, tensors, x, mask)
    if mask is not None:
        x = x.masked_fill(~mask, torch.finfo(x.dtype).min)
    numerators = (x - x.amax(-1, keepdim=True)).exp_()
    return numerators if mask is None else numerators.masked_fill_(~mask, 0.0)


def weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values / Σ weights``: [..., T, S] and [..., S, d]; 0 where all weights are 0.

    Traced by torch.fx, it is one node.
    """
    if has_torch_function((weights, values)):
        return handle_torch_function(weighted_mean, (weights, values), weights, values)
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights, values) / torch.where(total == 0, torch.ones_like(total), total)
