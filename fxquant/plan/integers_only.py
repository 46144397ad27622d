"""Integers alone: nothing between the first integers and the last may stay float."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import fx

from fxquant.errors import CompileError
from passes import tensor_info
from passes.infra.walk import reached

__all__ = ["between_integers", "refuse_floats"]

_FOLLOWS = re.compile(r"its (consumers are|operand \S+ is) float")


def between_integers(graph: fx.Graph, is_integer: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes that yield a float tensor, behind one integer operation and before another."""
    integers = [node for node in graph.nodes if is_integer(node)]
    behind = set(reached(integers, lambda node: node.users))
    between = behind.intersection(reached(integers, lambda node: node.all_input_nodes))
    return [node for node in graph.nodes if node in between and _is_float(node)]


def refuse_floats(stayed: Iterable[str], reasons: Mapping[str, str]) -> None:
    """Raise CompileError naming the operations that `stayed` float, by reason; none: nothing."""
    names = dict.fromkeys(stayed)
    if names:
        raise CompileError(
            f"integers alone are asked for, and operations stayed float: {_why(names, reasons)}; "
            "choose integer forms in the recipe's operations, keep them in front of the integers "
            'by start_at, or set requantization = "float"'
        )


def _why(stayed: Iterable[str], reasons: Mapping[str, str]) -> str:
    """Names by reason; what follows from another operation's being float is left out."""
    groups: dict[str, list[str]] = {}
    for name in stayed:
        # Without a reason it runs on integers and only yields floats to what does not.
        if name in reasons:
            groups.setdefault(reasons[name], []).append(name)
    causes = {why: names for why, names in groups.items() if not _FOLLOWS.match(why)}
    return "; ".join(
        f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''} ({why})"
        for why, names in (causes or groups).items()
    ) or ", ".join(stayed)


def _is_float(node: fx.Node) -> bool:
    info = tensor_info(node)
    return info is not None and info.dtype.is_floating_point
