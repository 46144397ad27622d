"""One operand of a concatenation, traced back through its convolutions."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.backends.x86.rewrites.convolution import Convolution
from passes import tensor_info

__all__ = ["Branch", "find_branch"]


@dataclass(frozen=True)
class Branch:
    """Some channels of `source`, and the convolutions that they go through, first to last."""

    source: fx.Node
    channels: range
    nodes: tuple[fx.Node, ...]
    convolutions: tuple[Convolution, ...]


def find_branch(operand: fx.Node) -> Branch:
    """The longest chain of mergeable convolutions that nothing but `operand` comes of."""
    nodes: list[fx.Node] = []
    convolutions: list[Convolution] = []
    value = operand
    while len(value.users) == 1 and (convolution := _mergeable(value)) is not None:
        nodes.insert(0, value)
        convolutions.insert(0, convolution)
        value = convolution.x
    source, channels = _channels(value)
    return Branch(source, channels, tuple(nodes), tuple(convolutions))


def _mergeable(node: fx.Node) -> Convolution | None:
    convolution = Convolution.read(node)
    if convolution is None or convolution.dtype != torch.uint8:
        return None
    plain = convolution.weight_zero_point is None and convolution.residual is None
    return convolution if plain and (convolution.groups == 1 or convolution.depthwise) else None


def _channels(value: fx.Node) -> tuple[fx.Node, range]:
    """What `value` takes channels of, and which: itself and all unless it is a part of a split."""
    if value.target is operator.getitem:
        parts, index = value.args
        assert isinstance(parts, fx.Node)
        infos: Any = parts.meta.get("tensor")
        split = parts.target in (torch.chunk, torch.split) and parts.kwargs.get("dim") == 1
        if split and isinstance(infos, (tuple, list)) and isinstance(index, int):
            sizes = [info.shape[1] for info in infos]
            index %= len(sizes)
            start = sum(sizes[:index])
            return parts.all_input_nodes[0], range(start, start + sizes[index])
    info = tensor_info(value)
    rank = 0 if info is None else len(info.shape)
    return value, range(info.shape[1] if info is not None and rank > 1 else 0)
