"""The target that executes the integer semantics exactly: the integer graph as it is."""

from __future__ import annotations

from torch import fx

from passes import copy_sharing_tensors

__all__ = ["lower_reference"]


def lower_reference(integer: fx.GraphModule, keep: frozenset[str] = frozenset()) -> fx.GraphModule:
    """The integer graph itself; `torch.ops.fxquant.*` are the reference implementations."""
    return copy_sharing_tensors(integer)
