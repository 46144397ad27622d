"""Operations spelled out of smaller ones: channel shuffle, SiLU, hard sigmoid, normalize."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from passes.infra.base import tensor_info
from passes.infra.rewrite import Rewriter

__all__ = ["recognize_channel_shuffle", "recognize_gates", "recognize_normalize"]


def recognize_channel_shuffle(rewriter: Rewriter) -> None:
    """``reshape, transpose, reshape`` is `F.channel_shuffle` where the shapes prove it.

    The shapes [N, C, ...] → [N, g, C/g, ...] → [N, C/g, g, ...] → [N, C, ...] leave no other
    meaning: a reshape keeps the order of the elements.
    """
    for last in list(rewriter.graph.nodes):
        if last.target not in (torch.reshape, torch.flatten):
            continue
        swap = _skip_copy(last.args[0])
        first = _skip_copy(swap.args[0]) if swap is not None and _swaps_groups(swap) else None
        if first is None or swap is None or first.target is not torch.reshape:
            continue
        source = first.args[0]
        shapes = [_shape(node) for node in (source, first, swap, last)]
        if any(shape is None for shape in shapes) or not all(
            len(node.users) == 1 for node in (first, swap)
        ):
            continue
        before, split, _, after = (shape or () for shape in shapes)
        # The operator takes no tensor with fewer than three dimensions.
        if before == after and len(before) >= 3 and len(split) == len(before) + 1:
            groups = split[1]
            if split == (before[0], groups, before[1] // groups, *before[2:]):
                parts = (first, swap)
                rewriter.replace_call(
                    last, F.channel_shuffle, (source,), {"groups": groups}, sources=parts
                )


def _swaps_groups(node: fx.Node) -> bool:
    shape = _shape(node)
    if shape is None:
        return False
    if node.target is torch.transpose:
        dims = {node.kwargs["dim0"], node.kwargs["dim1"]}
        return {dim % len(shape) for dim in dims if isinstance(dim, int)} == {1, 2}
    if node.target is torch.permute:
        return node.kwargs["dims"] == (0, 2, 1, *range(3, len(shape)))
    return False


def _skip_copy(value: Any) -> fx.Node | None:
    while isinstance(value, fx.Node) and value.target in ("contiguous", torch.clone):
        value = value.args[0] if len(value.users) == 1 else None
    return value if isinstance(value, fx.Node) else None


def _shape(node: Any) -> tuple[int, ...] | None:
    info = tensor_info(node)
    return info.shape if info is not None else None


def recognize_gates(rewriter: Rewriter) -> None:
    """``relu6(x + 3) / 6`` is hard sigmoid; x times it hard swish; x times sigmoid(x) SiLU."""
    gates: dict[Any, Any] = {torch.sigmoid: F.silu, F.hardsigmoid: F.hardswish}
    plain = {"inplace": False}
    for node in list(rewriter.graph.nodes):
        part = _divided_by_six(node)
        if part is None:
            continue
        found = _relu6_of_three_more(part)
        if found is not None:
            x, add = found
            rewriter.replace_call(node, F.hardsigmoid, (x,), plain, sources=(part, add))
            continue
        for x, clamp in _factors(part):
            found = _relu6_of_three_more(clamp)
            if found is not None and found[0] is x and _read_once(part):
                parts = (part, clamp, found[1])
                rewriter.replace_call(node, F.hardswish, (x,), plain, sources=parts)
                break
    for node in list(rewriter.graph.nodes):
        for x, gate in _factors(node):
            # A gate that something else reads has to be computed anyway.
            if gate.target in gates and gate.args[:1] == (x,) and _read_once(gate):
                rewriter.replace_call(node, gates[gate.target], (x,), plain, sources=(gate,))
                break


def recognize_normalize(rewriter: Rewriter) -> None:
    """``x / norm(x, keepdim=True).clamp_min(eps).expand_as(x)`` is `F.normalize`."""
    for node in list(rewriter.graph.nodes):
        if node.target is not torch.div or len(node.args) != 2 or node.kwargs.get("rounding_mode"):
            continue
        chain = [node.args[1]]
        for target in ("expand_as", torch.clamp):
            found = chain[-1]
            if not isinstance(found, fx.Node) or found.target != target or not _read_once(found):
                break
            chain.append(found.args[0])
        norm: Any = chain[-1]
        if len(chain) < 3 or norm.target is not torch.linalg.vector_norm or not _read_once(norm):
            continue
        expand, clamp = chain[:2]
        names = ("x", "ord", "dim", "keepdim")
        given = {
            "ord": 2,
            "dim": None,
            "keepdim": False,
            **dict(zip(names, norm.args, strict=False)),
        }
        given |= norm.kwargs
        x, dims = node.args[0], given["dim"]
        dim = dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims
        same = given["x"] is x and expand.args[1] is x and given["keepdim"]
        if same and isinstance(dim, int) and clamp.kwargs["max"] is None:
            options = {"p": given["ord"], "dim": dim, "eps": clamp.kwargs["min"]}
            rewriter.replace_call(node, F.normalize, (x,), options, sources=(expand, clamp, norm))


def _read_once(node: fx.Node) -> bool:
    return len(node.users) == 1


def _factors(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """The two operands of a product, in both orders."""
    if node.target is not torch.mul or len(node.args) != 2:
        return ()
    x, y = node.args
    return ((x, y), (y, x)) if isinstance(x, fx.Node) and isinstance(y, fx.Node) else ()


def _divided_by_six(node: fx.Node) -> fx.Node | None:
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)):
        return None
    divides = node.target is torch.div and number == 6
    scales = node.target is torch.mul and abs(number - 1 / 6) < 1e-9
    return node.args[0] if divides or scales else None


def _relu6_of_three_more(clamp: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """For ``relu6(x + 3)``, of which nothing else is read: x and the addition."""
    add = clamp.args[0] if clamp.target is F.relu6 and _read_once(clamp) else None
    if not isinstance(add, fx.Node) or add.target is not torch.add or not _read_once(add):
        return None
    x = add.args[0]
    plain = add.args[1:] == (3,) and not add.kwargs
    return (x, add) if plain and isinstance(x, fx.Node) else None
