"""`torch.unbind`, `torch.select` and `torch.narrow` as indexing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from passes.infra.base import shape_of
from passes.infra.rewrite import Rewriter

__all__ = ["spell_indexing"]


def spell_indexing(rewriter: Rewriter) -> None:
    """``q, k, v = x.unbind(0)`` is ``x[0], x[1], x[2]``, a selected item ``x[:, i]``.

    Acts on canonical calls whose operand has a known rank. An unbound value that is read as a
    whole stays.
    """
    for node in list(rewriter.graph.nodes):
        if node.target is torch.unbind and all(_picks(user) for user in node.users):
            for user in list(node.users):
                _index(rewriter, user, node, user.args[1])
        elif node.target is torch.select:
            _index(rewriter, node, node, node.kwargs["index"])
        elif node.target is torch.narrow:
            start, length = node.kwargs["start"], node.kwargs["length"]
            if isinstance(start, int) and isinstance(length, int) and start >= 0:
                _index(rewriter, node, node, slice(start, start + length))


def _picks(user: fx.Node) -> bool:
    return user.target is operator.getitem and isinstance(user.args[1], int)


def _index(rewriter: Rewriter, old: fx.Node, call: fx.Node, index: Any) -> None:
    shape, dim = shape_of(call.args[0]), call.kwargs["dim"]
    if shape is None or not isinstance(dim, int):
        return
    place = (*[slice(None)] * (dim % len(shape)), index)
    # A single number is how Python code writes the first dimension.
    indices = place[0] if len(place) == 1 else place
    sources = (call,) if call is not old else ()
    rewriter.replace_call(old, operator.getitem, (call.args[0], indices), sources=sources)
