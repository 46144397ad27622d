"""One way to follow the values of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

__all__ = ["reached"]


def reached(
    starts: Iterable[fx.Node], further: Callable[[fx.Node], Iterable[fx.Node]]
) -> list[fx.Node]:
    """`starts` and all nodes that `further`, from node to nodes, leads to; each one once.

    ``lambda node: node.all_input_nodes`` leads to all that the starts are computed from.
    """
    found = dict.fromkeys(starts)
    pending = list(found)
    while pending:
        new = [node for node in further(pending.pop()) if node not in found]
        found |= dict.fromkeys(new)
        pending += dict.fromkeys(new)
    return list(found)
