"""Masks of attention, and the scores, probabilities and sums that they apply to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.attention.functions import masked_softmax, scaled_matmul
from passes.infra.base import tensor_info
from passes.infra.expansion import Expansion
from passes.infra.stored import constant_value

__all__ = ["HIDDEN", "Masks", "attend", "causal_mask", "positions_left", "soften"]

HIDDEN = -1e4
"""What is added to a score to take its position out: this, or less. exp(-1e4) is 0 in float32."""


@dataclass
class Masks:
    """What restricts the scores: bool masks (True takes part) and float terms to add.

    A constant bool mask is a tensor, one that is computed while the model runs is a node.
    """

    allowed: list[Tensor | fx.Node] = field(default_factory=list)
    added: list[fx.Node] = field(default_factory=list)

    def add(
        self,
        expansion: Expansion,
        mask: fx.Node,
        *,
        shape: tuple[int, ...] | None = None,
        true_hides: bool = False,
    ) -> None:
        """Take in a bool mask or a float mask that is added; it broadcasts to the scores.

        It is reshaped to `shape` first, where that is given. A constant float mask that only
        hides is a bool mask.
        """
        constant = constant_value(mask)
        info = tensor_info(mask)
        dtype = constant.dtype if constant is not None else info.dtype if info else None
        if constant is not None:
            constant = constant if shape is None else constant.reshape(shape)
            allowed = constant if dtype is torch.bool else positions_left(constant)
            if allowed is not None:
                hides = true_hides and dtype is torch.bool
                self.allowed.append(~allowed if hides else allowed)
                return
        node = mask if shape is None else expansion.reshape(mask, *shape)
        if dtype is not torch.bool:
            self.added.append(node)
        else:
            self.allowed.append(expansion.call(torch.logical_not, node) if true_hides else node)


def positions_left(mask: Tensor) -> Tensor | None:
    """The bool image of a float mask that is added to scores: True where it adds 0.

    None where it does more than hide positions (all values are 0 or at most `HIDDEN`), or where
    it hides a whole row: softmax would then give something else than 0.
    """
    if not mask.is_floating_point() or mask.dim() == 0:
        return None
    left = mask == 0
    if not bool((left | (mask <= HIDDEN)).all()) or not bool(left.any(dim=-1).all()):
        return None
    return left


def causal_mask(queries: int, keys: int) -> Tensor:
    """Bool [queries, keys]: query i sees the keys up to i."""
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def soften(expansion: Expansion, scores: fx.Node, allowed: Sequence[Tensor | fx.Node]) -> fx.Node:
    """The softmax of `scores` over the last dim, of what all masks in `allowed` leave."""
    constants = [mask for mask in allowed if isinstance(mask, Tensor)]
    nodes = [mask for mask in allowed if isinstance(mask, fx.Node)]
    if constants:
        constant = reduce(torch.logical_and, constants)
        if not bool(constant.all()):
            nodes.append(expansion.constant("attention_mask", constant))
    if not nodes:
        return expansion.call(F.softmax, scores, dim=-1)
    mask = reduce(lambda a, b: expansion.call(torch.logical_and, a, b), nodes)
    return expansion.call(masked_softmax, scores, mask, dim=-1)


def attend(
    expansion: Expansion,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    *,
    scale: float,
    masks: Masks,
) -> tuple[fx.Node, fx.Node]:
    """Attention of q [..., T, d] and k [..., d, S] to v [..., S, e].

    Returns the nodes of the result [..., T, e] and of the probabilities [..., T, S].
    """
    if scale == 1:
        scores = expansion.call(torch.matmul, q, k)
    else:
        scores = expansion.call(scaled_matmul, q, k, scale=scale)
    for term in masks.added:
        scores = expansion.call(torch.add, scores, term)
    probabilities = soften(expansion, scores, masks.allowed)
    return expansion.call(torch.matmul, probabilities, v), probabilities
