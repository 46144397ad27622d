"""The target that executes the integer semantics exactly: the integer graph as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxquant.backends.target import Execution, LoweredGraph
from passes import copy_sharing_tensors

__all__ = ["Reference"]


class Reference:
    """`torch.ops.fxquant.*` are the reference implementations: nothing is left to lower."""

    name = "reference"
    tolerance = 0
    passes = ()

    def unavailable(self) -> str:
        """It runs wherever torch does."""
        return ""

    def weight_refusal(self) -> None:
        """Its sums never saturate."""

    def lower(
        self, integer: fx.GraphModule, example: Sequence[Any], keep: frozenset[str] = frozenset()
    ) -> LoweredGraph:
        """The integer graph itself."""
        return LoweredGraph(copy_sharing_tensors(integer), has_run=True)

    def check(
        self, integer: fx.GraphModule, lowered: fx.GraphModule, example: Sequence[Any]
    ) -> None:
        """It is what others are compared with."""

    def execution(self, lowered: fx.GraphModule, example: Sequence[Any]) -> Execution:
        """The graph's own forward."""
        return Execution(lowered.forward)
