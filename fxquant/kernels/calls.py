"""Calls of our operators: their arguments by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

__all__ = ["bind", "operator_arguments"]


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an operator by the names of its schema, defaults filled in."""
    arguments = target._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    names = [a.name for a in arguments]
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def operator_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call in a graph: see `bind`."""
    return bind(node.target, node.args, node.kwargs)
