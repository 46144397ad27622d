"""Torch's int8 kernels on x86 as a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxquant.backends.check import TargetCheck, check_operations
from fxquant.backends.target import Execution, LoweredGraph
from fxquant.backends.x86.executor import Executor
from fxquant.backends.x86.operator_table import lower_to_kernels
from fxquant.backends.x86.rewrites import PASSES, rewrite
from fxquant.backends.x86.saturation import weight_refusal
from fxquant.simulate.weight_fit import WeightRefusal

__all__ = ["X86"]

_ENGINES = ("onednn", "fbgemm")


class X86:
    """Kernels that torch brings along: they round in another order than the reference."""

    name = "x86"
    tolerance = 1
    passes = PASSES

    def unavailable(self) -> str:
        """Both engines whose kernels are called must be built into torch."""
        missing = [e for e in _ENGINES if e not in torch.backends.quantized.supported_engines]
        return f"this build of torch has no {' and no '.join(missing)}" if missing else ""

    def weight_refusal(self) -> WeightRefusal | None:
        """A CPU without VNNI saturates on pairs of large weights."""
        return weight_refusal()

    def lower(
        self, integer: fx.GraphModule, example: Sequence[Any], keep: frozenset[str] = frozenset()
    ) -> LoweredGraph:
        """The integer graph rewritten for the kernels, then lowered to calls of them.

        Where anything was rewritten, ``meta["rewritten"]`` of the graph that comes out is what it
        was lowered from.
        """
        rewritten, records = rewrite(integer, example)
        lowered = lower_to_kernels(rewritten, keep)
        if any(record.modified for record in records):
            lowered.meta["rewritten"] = rewritten
        return LoweredGraph(lowered, records)

    def check(
        self, integer: fx.GraphModule, lowered: fx.GraphModule, example: Sequence[Any]
    ) -> TargetCheck:
        """Every operation fed with the same integers."""
        return check_operations(integer, lowered, example)

    def execution(self, lowered: fx.GraphModule, example: Sequence[Any]) -> Execution:
        """Stretches of kernel calls without Python in between, where torch can trace them."""
        executor = Executor(lowered, example)
        return Execution(executor, executor.notes)
