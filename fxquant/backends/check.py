"""What a target's graph computes against the integer graph, operation by operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import CompileError
from fxquant.metrics import Closeness
from passes.infra.verify import flatten

__all__ = ["OperationDifference", "TargetCheck", "check_operations", "whole_network"]


@dataclass(frozen=True)
class OperationDifference:
    """One operation given the same integers in: how what it gives differs.

    `largest` is in steps of its grid; of one that gives floats, in 255ths of the largest value.
    """

    node: str
    operation: str
    largest: int
    differing: int
    values: int


@dataclass(frozen=True)
class TargetCheck:
    """A target against the reference on probe inputs.

    `operations`: one entry a lowered operation that yields integers. `output_differing`: the
    share of the network's output values that differ when the target runs on its own.
    `approximated`: how many float operations it computes itself, which are not torch's to the
    last bit: behind them its integers may be others.
    """

    operations: tuple[OperationDifference, ...]
    output_differing: float
    output_sqnr_db: float
    approximated: int = 0

    @property
    def largest(self) -> int:
        """The largest difference of any operation, in steps of its output."""
        return max((entry.largest for entry in self.operations), default=0)

    @property
    def share_differing(self) -> float:
        """The share of all integers that differ, each operation fed with the same integers."""
        values = sum(entry.values for entry in self.operations)
        return sum(entry.differing for entry in self.operations) / values if values else 0.0

    def summary(self) -> dict[str, Any]:
        """The check as plain data, as a report has it."""
        return {
            "largest_difference": self.largest,
            "share_differing": self.share_differing,
            "values": sum(entry.values for entry in self.operations),
            "output_differing": self.output_differing,
            # JSON has no infinity: None says that the outputs are equal to the bit.
            "output_sqnr_db": self.output_sqnr_db if math.isfinite(self.output_sqnr_db) else None,
            "operations": [asdict(entry) for entry in self.operations if entry.differing],
        }


class _Recorder(fx.Interpreter):
    """Runs the integer graph and keeps its integers, and the floats that operators make of them."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and ("grid" in n.meta or _makes_floats(n, result)):
            self.values[n.name] = result
        return result


class _LockStep(fx.Interpreter):
    """Runs a target's graph, comparing every operation and then continuing from the reference."""

    def __init__(self, graph_module: fx.GraphModule, expected: dict[str, Tensor]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.expected = expected
        self.found: dict[str, OperationDifference] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = str(n.meta.get("integer", ""))
        want = self.expected.get(name)
        if want is None or not isinstance(result, Tensor):
            return result
        got = result.int_repr() if result.is_quantized else result
        if got.shape != want.shape or got.is_floating_point() != want.is_floating_point():
            return result
        difference = _steps(got, want)
        # Several nodes may stand for one integer node (a kernel and its clamp): the last counts.
        self.found[name] = OperationDifference(
            name,
            str(getattr(n.target, "__name__", n.target)),
            int(difference.max()) if difference.numel() else 0,
            int((difference > 0).sum()),
            difference.numel(),
        )
        last = not any(user.meta.get("integer") == name for user in n.users)
        if not last:
            return result
        if result.is_quantized:
            return torch._make_per_tensor_quantized_tensor(
                _like(want, got), result.q_scale(), result.q_zero_point()
            )
        return want


def _makes_floats(node: fx.Node, result: Tensor) -> bool:
    """Whether it is an operator whose products are floats at once."""
    target = node.target
    return (
        result.is_floating_point()
        and isinstance(target, torch._ops.OpOverload)
        and target.namespace == "fxquant"
        and target is not torch.ops.fxquant.dequantize.default
    )


def _steps(got: Tensor, want: Tensor) -> Tensor:
    """How far apart they are: whole steps of integers, and of floats 255ths of the largest one.

    Floats differ by their rounding in any case, which is far below one step.
    """
    if not want.is_floating_point():
        return (got.to(torch.int32) - want.to(torch.int32)).abs()
    largest = want.abs().max() if want.numel() else want.new_zeros(())
    steps = (got - want).abs() * (255 / largest.clamp(min=1e-30))
    return steps.round().clamp(max=2**30).to(torch.int32)


def _like(value: Tensor, layout: Tensor) -> Tensor:
    return torch.empty_like(layout).copy_(value)


def check_operations(
    integer: fx.GraphModule, lowered: fx.GraphModule, inputs: Sequence[Any]
) -> TargetCheck:
    """Compare `lowered` with the integer graph that it was made from, on `inputs`.

    Where the target rewrites the integer graph first, it is compared with what it made of it,
    whose outputs must be those of the integer graph to the bit: raises CompileError otherwise.
    """
    rewritten = lowered.meta.get("rewritten", integer)
    with torch.no_grad():
        recorder = _Recorder(rewritten)
        expected = recorder.run(*inputs)
        if rewritten is not integer and not _equal(integer(*inputs), expected):
            raise CompileError(
                "the integer graph as rewritten for the target yields other integers; please "
                'report it, and compile with target="reference" meanwhile'
            )
        lock_step = _LockStep(lowered, recorder.values)
        lock_step.run(*inputs)
        differing, sqnr = whole_network(expected, lowered(*inputs))
    return TargetCheck(tuple(lock_step.found.values()), differing, sqnr)


def _equal(expected: Any, found: Any) -> bool:
    pairs = zip(flatten(expected), flatten(found), strict=True)
    return all(
        torch.equal(want, got) if isinstance(want, Tensor) else want == got
        for (_, want), (_, got) in pairs
    )


def whole_network(expected: Any, found: Any) -> tuple[float, float]:
    """The share of output values that differ, and the SQNR in dB of one against the other."""
    closeness = Closeness()
    differing = values = 0
    for (_, want), (_, got) in zip(flatten(expected), flatten(found), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point():
            differing += int((want != got).sum())
            values += want.numel()
            closeness.add(want, got)
    return (differing / values if values else 0.0), closeness.sqnr_db
