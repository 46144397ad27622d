"""What a target is: all that the rest of the compiler asks of one.

A target is a package beside this file and a line in `fxquant.backends.targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from fxquant.backends.check import TargetCheck
from fxquant.simulate.weight_fit import WeightRefusal
from passes import Pass, PassRecord

__all__ = ["Execution", "LoweredGraph", "Target"]


@dataclass(frozen=True)
class LoweredGraph:
    """What a target makes of an integer graph.

    `graph_module` takes the inputs of the integer graph and gives its outputs; it is the last
    stage of a compile, and what listings and dumps show. A node that stands for an integer node
    has that one's name in ``meta["integer"]``; one that calls the reference operator for want of
    a kernel has ``meta["kernel"] == "reference"``. `records` are those of the passes that rewrote
    the integer graph first, `notes` are for the report. `has_run` says that it is a copy of the
    integer graph, which has run and knows its shapes.
    """

    graph_module: fx.GraphModule
    records: tuple[PassRecord, ...] = ()
    notes: tuple[str, ...] = ()
    has_run: bool = False


@dataclass(frozen=True)
class Execution:
    """How a lowered graph is run: a callable like the graph, and notes for the report."""

    run: Callable[..., Any]
    notes: tuple[str, ...] = ()


class Target(Protocol):
    """Something that runs integer graphs."""

    @property
    def name(self) -> str:
        """What users call it; also the name of its stage."""

    @property
    def tolerance(self) -> int:
        """How many steps an operation may be off from the integer graph's; 0: not one bit."""

    @property
    def passes(self) -> tuple[type[Pass], ...]:
        """The passes that rewrite the integer graph before it is lowered."""

    def unavailable(self) -> str:
        """Why this machine cannot run it, and what would help; "" where it can."""

    def weight_refusal(self) -> WeightRefusal | None:
        """Which int8 weights it cannot compute with exactly; None where it can with all."""

    def lower(
        self, integer: fx.GraphModule, example: Sequence[Any], keep: frozenset[str]
    ) -> LoweredGraph:
        """Lower an annotated integer graph, which stays as it is.

        `example` are inputs that the graph runs on; the batch size stays free. The operations of
        the nodes named in `keep` must be the reference's, to the bit. Raises TargetError where
        the graph cannot be lowered.
        """

    def check(
        self, integer: fx.GraphModule, lowered: fx.GraphModule, example: Sequence[Any]
    ) -> TargetCheck | None:
        """Compare what was lowered with the integer graph, operation by operation, on `example`.

        `check_operations` does it for graphs whose nodes name the integer nodes that they stand
        for. None where there is nothing to compare: the integer graph itself runs.
        """

    def execution(self, lowered: fx.GraphModule, example: Sequence[Any]) -> Execution:
        """The fastest way to run a graph of `lower`, with the same outputs."""
