"""C++ kernels of our own as a target."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.check import OperationDifference, TargetCheck, check_operations
from fxquant.backends.native.build import kept, stored, why_unavailable
from fxquant.backends.native.executor import CompiledSegment
from fxquant.backends.native.lower import lower_to_native
from fxquant.backends.native.lowerings import torch_has_the_bits
from fxquant.backends.native.program_module import NativeProgram
from fxquant.backends.target import Execution, LoweredGraph
from passes.infra.listing import operation

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
        left = {operation(node) for node in integer.graph.nodes if torch_has_the_bits(node)}
        notes = tuple(
            f"native leaves {count} x {what} of floats to torch, so that its bits are the "
            "reference's; an exported network computes it itself"
            if what in left
            else f"native has no kernel for {count} x {what}: Python calls torch for it"
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
        the network alone: behind them an integer may be one step from the reference's. Programs
        that were compared before, on this instruction set and example, are not compared again.
        """
        key = _comparison(lowered, example)
        known = kept(key)
        if known is not None:
            return _read(known)
        found = check_operations(integer, lowered, example)
        approximated = int(lowered.meta["approximated"])
        if approximated:
            found = replace(found, operations=(), approximated=approximated)
        elif found.largest == 0 and found.output_differing:
            # Programs yield dense values where the reference's may be views, over which some of
            # torch's own float operations add in another order.
            found = replace(found, approximated=_floats_of_torch(lowered))
        if found.largest == 0 and (approximated or not found.output_differing):
            stored(key, json.dumps(asdict(found)).encode())
        return found

    def execution(self, lowered: fx.GraphModule, example: Sequence[Any]) -> Execution:
        """The graph's own forward: a call of each native program."""
        return Execution(lowered.forward)


def _floats_of_torch(lowered: fx.GraphModule) -> int:
    """How many float operations torch computes, between programs or behind them."""
    left = (node for node in lowered.graph.nodes if node.meta.get("kernel") == "reference")
    return sum(not operation(node).startswith("fxquant.") for node in left)


def _comparison(lowered: fx.GraphModule, example: Sequence[Any]) -> str:
    """The name of the file that says how these programs compared: their keys name their graphs."""
    key = hashlib.sha256(str(lowered.graph).encode())
    for segment in _segments(lowered):
        key.update(f"{segment.key} {segment.program.library.name} {segment.program.isa}|".encode())
    for value in example:
        key.update(repr(value).encode() if not isinstance(value, Tensor) else _bytes(value))
    return f"{key.hexdigest()[:40]}.compared.json"


def _bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(data: bytes) -> TargetCheck:
    found = json.loads(data)
    operations = tuple(OperationDifference(**row) for row in found.pop("operations"))
    return TargetCheck(operations, **found)


def _segments(lowered: fx.GraphModule) -> list[CompiledSegment]:
    programs = (module for module in lowered.modules() if isinstance(module, NativeProgram))
    return [segment for program in programs for segment in program.segments]


def _memory(lowered: fx.GraphModule) -> tuple[int, int]:
    """Bytes of the arenas, and of all values that lie in them."""
    segments = _segments(lowered)
    return sum(s.arena for s in segments), sum(s.total for s in segments)
