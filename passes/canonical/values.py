"""What kind of value a node holds: a tensor, a number, or the sizes of a tensor."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from passes.infra.base import tensor_info

__all__ = ["is_number", "is_size", "is_tensor"]

_ARITHMETIC = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.truediv,
    operator.mod,
    operator.neg,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.ifloordiv,
)


def is_size(value: Any) -> bool:
    """Whether `value` is the size of a tensor or a slice of one: a sequence of numbers."""
    if not isinstance(value, fx.Node):
        return False
    if value.target == "size" and value.op == "call_method":
        return len(value.args) == 1 and not value.kwargs
    if value.target is getattr:
        return bool(value.args[1] == "shape")
    if value.target is operator.getitem:
        return is_size(value.args[0]) and isinstance(value.args[1], slice)
    return False


def is_number(value: Any) -> bool:
    """Whether `value` is a number, or a node that computes one from sizes."""
    if isinstance(value, (int, float)):
        return True
    if not isinstance(value, fx.Node) or tensor_info(value) is not None:
        return False
    if value.op == "call_method":
        return (value.target == "size" and not is_size(value)) or value.target in ("dim", "numel")
    if value.target is getattr:
        return bool(value.args[1] == "ndim")
    if value.target is operator.getitem:
        return is_size(value.args[0]) and not isinstance(value.args[1], slice)
    if value.target in _ARITHMETIC or value.target in (int, float, round, max, min):
        return all(is_number(argument) for argument in value.args)
    return False


def is_tensor(value: Any) -> bool:
    """Whether `value` is a node that holds one tensor.

    Annotated nodes say so; in a graph that was never run, everything but sizes is taken for one.
    """
    if not isinstance(value, fx.Node):
        return False
    if tensor_info(value) is not None:
        return True
    annotated = any("tensor" in node.meta for node in value.graph.nodes)
    return not annotated and not is_number(value) and not is_size(value)
