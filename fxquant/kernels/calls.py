"""Reading the calls of our operators in a graph."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["operator_arguments"]


def operator_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by the names of its schema, defaults filled in."""
    target: Any = node.target
    arguments = target._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    names = [a.name for a in arguments]
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
