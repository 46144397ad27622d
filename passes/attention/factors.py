"""Attention written by hand: factors of queries, keys and scores go into the product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from passes.attention.functions import scaled_matmul
from passes.canonical.plain_values import PlainValues
from passes.infra.base import Decline, tensor_info
from passes.infra.rewrite import Rewriter
from passes.infra.stored import constant_value

__all__ = ["fold_factors"]

_MOVES = frozenset(
    {
        torch.reshape,
        torch.permute,
        torch.transpose,
        torch.unsqueeze,
        torch.squeeze,
        torch.flatten,
        torch.unflatten,
    }
)
_MOVING_METHODS = frozenset({"contiguous", "expand"})


def fold_factors(rewriter: Rewriter, values: PlainValues) -> list[Decline]:
    """``(q·s) @ k``, ``q @ (k·s)`` and ``(q @ k)·s`` become ``scaled_matmul(q, k, scale=s)``.

    The factor is a number or a constant of one element, also of a division; reshapes and
    permutations may stand between. Products with a constant are layers and stay.
    """
    declines: list[Decline] = []
    for product in list(rewriter.graph.nodes):
        if product.target not in (torch.matmul, scaled_matmul) or len(product.args) != 2:
            continue
        if any(constant_value(operand) is not None for operand in product.args):
            continue
        factor = float(product.kwargs.get("scale", 1.0))
        folded: list[fx.Node] = []
        for index in (0, 1):
            while (found := _factor_before(product, index, values)) is not None:
                node, number, reason = found
                if reason:
                    declines.append(Decline.at(node, reason))
                    break
                factor *= number
                folded.append(node)
                _bypass(rewriter, node)
        while (found_behind := _factor_behind(product, values)) is not None:
            node, number = found_behind
            factor *= number
            folded.append(node)
            _bypass(rewriter, node)
        if not folded:
            continue
        a, b = product.args
        if factor == 1:
            rewriter.replace_call(product, torch.matmul, (a, b), {}, sources=folded)
        else:
            rewriter.replace_call(product, scaled_matmul, (a, b), {"scale": factor}, sources=folded)
    return declines


def _factor_before(
    product: fx.Node, index: int, values: PlainValues
) -> tuple[fx.Node, float, str] | None:
    """A multiplication in front of an operand; the text says why it has to stay."""
    node: Any = product.args[index]
    reader = product
    while isinstance(node, fx.Node):
        # A square reads the same node in both places.
        shared = len(_readers(node)) > 1 or reader.args.count(node) > 1
        number = _factor(node, values)
        if number is not None:
            return node, number, "what it scales is read elsewhere too" if shared else ""
        if shared or not _moves(node):
            return None
        node, reader = node.args[0], node
    return None


def _factor_behind(product: fx.Node, values: PlainValues) -> tuple[fx.Node, float] | None:
    node = product
    while len(readers := _readers(node)) == 1:
        user = readers[0]
        number = _factor(user, values)
        if number is not None and _scaled(user) is node:
            return user, number
        if not _moves(user) or user.args[0] is not node:
            return None
        node = user
    return None


def _factor(node: fx.Node, values: PlainValues) -> float | None:
    """The number that `node` multiplies its operand by, or None where it does something else."""
    if node.target not in (torch.mul, torch.div) or len(node.args) != 2 or node.kwargs:
        return None
    scaled = _scaled(node)
    if scaled is None or tensor_info(scaled) != tensor_info(node):
        return None
    other = node.args[1] if node.args[0] is scaled else node.args[0]
    number = _number(other, values)
    if number is None:
        return None
    factor = number if node.target is torch.mul else 1 / number if number else math.inf
    return factor if math.isfinite(factor) else None


def _scaled(node: fx.Node) -> fx.Node | None:
    """The operand that is a tensor and no constant, where there is exactly one."""
    operands = [
        operand
        for operand in node.args
        if isinstance(operand, fx.Node) and tensor_info(operand) and operand.op != "get_attr"
    ]
    if len(operands) != 1 or (node.target is torch.div and operands[0] is not node.args[0]):
        return None
    return operands[0]


def _number(value: Any, values: PlainValues) -> float | None:
    if isinstance(value, fx.Node):
        constant = constant_value(value)
        if constant is not None:
            return float(constant) if constant.numel() == 1 else None
        value = values.get(value) if tensor_info(value) is None else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def _bypass(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    source = _scaled(node)
    assert source is not None
    rewriter.redirect(node, source)
    rewriter.erase(node)
    return source


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the values of `node`, and not only its size."""
    return [
        user
        for user in node.users
        if user.op != "call_method" or user.target not in ("size", "dim")
    ]


def _moves(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _MOVING_METHODS
    return node.op == "call_function" and node.target in _MOVES
