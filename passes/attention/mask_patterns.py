"""Attention written by hand: what hides positions becomes the mask of the softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.attention.masks import HIDDEN, positions_left, soften
from passes.infra.base import Decline, shape_of, tensor_info
from passes.infra.expansion import Expansion
from passes.infra.meta import copy_meta
from passes.infra.rewrite import Rewriter
from passes.infra.stored import constant_value

__all__ = ["recognize_masks"]


def recognize_masks(rewriter: Rewriter) -> list[Decline]:
    """What hides positions in front of a softmax becomes the mask of `masked_softmax`.

    That is a constant added to the scores which is 0 or at most `HIDDEN` everywhere, and a
    `masked_fill` or `where` by such a number. Other terms between it and the softmax stay. A row
    that a mask of the running model hides as a whole gives 0 instead of NaN or equal shares.
    """
    declines: list[Decline] = []
    for softmax in list(rewriter.graph.nodes):
        if softmax.target is not F.softmax or not isinstance(softmax.args[0], fx.Node):
            continue
        expansion = Expansion(rewriter, softmax)
        allowed: list[Tensor | fx.Node] = []
        hiding: list[fx.Node] = []
        scores = softmax.args[0]
        reason = _why_not(softmax)
        while (found := _find_mask(scores)) is not None:
            path, node, rest, mask, inverted = found
            why = reason or _why_not_mask(node, rest, mask)
            if why:
                declines.append(Decline.at(node, why))
                break
            allowed.append(_allowed(expansion, mask, inverted))
            hiding.append(node)
            scores = _without(expansion, path, node, rest)
        if hiding:
            expansion.sources = tuple(hiding)
            expansion.finish(soften(expansion, scores, allowed))
    return declines


_Found = tuple[list[fx.Node], fx.Node, fx.Node, Any, bool]
"""The additions above it, the node that hides, its scores, its mask, whether True hides."""


def _find_mask(scores: fx.Node) -> _Found | None:
    path: list[fx.Node] = []
    node: Any = scores
    while isinstance(node, fx.Node):
        hiding = _hiding(node)
        if hiding is not None:
            return path, node, *hiding
        if node.target is not torch.add or node.kwargs or len(node.users) > 1:
            return None
        path.append(node)
        shape = shape_of(node)
        # The scores are the operand that has the full shape; a bias is broadcast to them.
        node = next(
            (x for x in node.args if shape_of(x) == shape and constant_value(x) is None), None
        )
    return None


def _hiding(node: fx.Node) -> tuple[fx.Node, Any, bool] | None:
    """The scores, the mask and whether True hides, where `node` hides positions."""
    if node.target is torch.add and not node.kwargs and len(node.args) == 2:
        for scores, term in (node.args, node.args[::-1]):
            constant = constant_value(term)
            if constant is not None and isinstance(scores, fx.Node) and _only_hides(constant):
                return scores, constant, False
    names = _NAMES.get(node.target) if node.op == "call_function" else None
    given: dict[str, Any] = dict(zip(names or (), node.args, strict=False)) | node.kwargs
    if names is None or len(given) != 3:
        return None
    if node.target is torch.masked_fill:
        scores, mask, number, inverted = given["input"], given["mask"], given["value"], True
    elif _hides(given.get("other")):
        scores, mask, number, inverted = given["input"], given["condition"], given["other"], False
    else:
        scores, mask, number, inverted = given["other"], given["condition"], given["input"], True
    if not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node) or not _hides(number):
        return None
    constant = constant_value(mask)
    return scores, mask if constant is None else constant, inverted


_NAMES: dict[Any, tuple[str, str, str]] = {
    torch.masked_fill: ("input", "mask", "value"),
    torch.where: ("condition", "input", "other"),
}


def _hides(value: Any) -> bool:
    constant = constant_value(value)
    if constant is not None and constant.numel() == 1:
        value = float(constant)
    return isinstance(value, (int, float)) and value <= HIDDEN


def _only_hides(mask: Tensor) -> bool:
    if not mask.is_floating_point() or mask.dim() == 0:
        return False
    hidden = mask <= HIDDEN
    return bool(hidden.any()) and bool((hidden | (mask == 0)).all())


def _why_not(softmax: fx.Node) -> str:
    info = tensor_info(softmax)
    if info is None:
        return "the shape of the softmax is not known"
    dim = softmax.kwargs.get("dim")
    if not isinstance(dim, int) or dim % len(info.shape) != len(info.shape) - 1:
        return "the softmax is not over the last dim"
    scores = tensor_info(softmax.args[0])
    if scores is None or scores.dtype != info.dtype:
        return "the softmax changes the type of the scores"
    return ""


def _why_not_mask(node: fx.Node, scores: fx.Node, mask: Any) -> str:
    if shape_of(scores) != shape_of(node):
        return "the mask has a larger shape than the scores"
    if isinstance(mask, fx.Node):
        info = tensor_info(mask)
        return "" if info and info.dtype is torch.bool else "the mask is not bool"
    if mask.dtype is not torch.bool and positions_left(mask) is None:
        return "the mask hides a whole row"
    return ""


def _allowed(expansion: Expansion, mask: Tensor | fx.Node, inverted: bool) -> Tensor | fx.Node:
    if isinstance(mask, fx.Node):
        return expansion.call(torch.logical_not, mask) if inverted else mask
    if mask.dtype is not torch.bool:
        left = positions_left(mask)
        assert left is not None
        return left
    return ~mask if inverted else mask


def _without(expansion: Expansion, path: list[fx.Node], node: fx.Node, scores: fx.Node) -> fx.Node:
    """The sum of `path` without the node that hides."""
    for add in reversed(path):
        operands = [scores if operand is node else operand for operand in add.args]
        again = expansion.call(torch.add, *operands)
        copy_meta(add, again, "shape")
        node, scores = add, again
    return scores
