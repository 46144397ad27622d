"""C++ kernels of our own as a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fxquant.backends.check import TargetCheck, check_operations
from fxquant.backends.native.build import why_unavailable
from fxquant.backends.native.lower import lower_to_native
from fxquant.backends.native.program_module import NativeProgram
from fxquant.backends.target import Execution, LoweredGraph

__all__ = ["Native"]


class Native:
    """Its integers are the reference's, to the bit, on every instruction set."""

    name = "native"
    tolerance = 0
    passes = ()

    def unavailable(self) -> str:
        """It needs a C++ compiler."""
        return why_unavailable() or ""

    def weight_refusal(self) -> None:
        """Its sums never saturate."""

    def lower(
        self, integer: fx.GraphModule, example: Sequence[Any], keep: frozenset[str] = frozenset()
    ) -> LoweredGraph:
        """Stretches of the graph as native programs, and what has no kernel between them."""
        lowered, reasons = lower_to_native(integer, example, keep)
        notes = tuple(
            f"native has no kernel for {count} x {what}: Python calls torch for it"
            for what, count in sorted(Counter(reasons).items())
        )
        arena, total = _memory(lowered)
        notes += (
            f"native keeps its values in {arena:,} bytes for one sample, {total:,} if each had its "
            "own",
        )
        approximated = lowered.meta["approximated"]
        if approximated:
            notes += (
                f"native computes {approximated} float operations itself, within "
                "4 units in the last place; an integer behind them may be a step from reference's",
            )
        return LoweredGraph(lowered, notes=notes)

    def check(
        self, integer: fx.GraphModule, lowered: fx.GraphModule, example: Sequence[Any]
    ) -> TargetCheck:
        """What comes out of every native stretch, fed with the same integers.

        A stretch that computes softmax, GELU or layer norm itself is compared at the outputs of
        the network alone: behind them an integer may be one step from the reference's.
        """
        found = check_operations(integer, lowered, example)
        approximated = int(lowered.meta["approximated"])
        if not approximated:
            return found
        return replace(found, operations=(), approximated=approximated)

    def execution(self, lowered: fx.GraphModule, example: Sequence[Any]) -> Execution:
        """The graph's own forward: a call of each native program."""
        return Execution(lowered.forward)


def _memory(lowered: fx.GraphModule) -> tuple[int, int]:
    """Bytes of the arenas, and of all values that lie in them."""
    segments = [
        segment
        for module in lowered.modules()
        if isinstance(module, NativeProgram)
        for segment in module.segments
    ]
    return sum(s.arena for s in segments), sum(s.total for s in segments)
