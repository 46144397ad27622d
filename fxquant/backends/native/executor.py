"""What runs an integer graph natively: plans for the shapes that come, built once each."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.backends.native.arena import Arena
from fxquant.backends.native.build import build, cache_folder, stored
from fxquant.backends.native.library import Program
from fxquant.backends.native.lowerings import LOWERINGS
from fxquant.backends.native.planned import Planned, find, graph_key, keep
from fxquant.backends.native.planner import Planner, ProgramPlan
from fxquant.backends.native.program import to_bytes
from fxquant.backends.native.schedule import place_buffers, set_barriers
from fxquant.backends.native.unit import unit_text
from fxquant.errors import TargetError

__all__ = ["CompiledSegment", "PlannedProgram", "compile_segment", "plan_program", "propagate"]

_PLANNED_BATCH = 2


class _Shapes(fx.Interpreter):
    """Runs a graph on fake tensors and keeps what every node gives."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n] = result
        return result


def propagate(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """What every node of a graph gives for inputs of these shapes, tensors as fake tensors."""
    shapes = _Shapes(graph_module)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [
            torch.empty(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in inputs
        ]
        shapes.run(*fakes)
    return shapes.found


def _is_scaled(one: Any, more: Any, low: int, high: int) -> bool:
    """Whether a value of `low` samples grows to that of `high` ones in dimension 0 alone."""
    if isinstance(one, Tensor):
        if one.dim() == 0 or one.shape[1:] != more.shape[1:]:
            return False
        return one.shape[0] * high == more.shape[0] * low and one.shape[0] % low == 0
    if isinstance(one, (tuple, list)):
        return all(_is_scaled(a, b, low, high) for a, b in zip(one, more, strict=True))
    return True


@dataclass(eq=False)
class CompiledSegment:
    """A native program of a graph, planned for inputs of these shapes.

    `key` is that of the graph; `was_planned`: whether the plan comes from the cache.
    """

    program: Program
    planned: Planned
    key: str
    was_planned: bool
    graph_module: fx.GraphModule
    shapes: Sequence[Any]

    @property
    def arena(self) -> int:
        """Bytes a sample."""
        return self.planned.arena

    @property
    def total(self) -> int:
        """Bytes a sample if every value had its own."""
        return self.planned.total

    @property
    def batch(self) -> int | None:
        """How many samples are planned; None where the plan is for one shape alone."""
        return self.planned.batch

    @functools.cached_property
    def plan(self) -> ProgramPlan:
        """The steps, planned again where they come from the cache."""
        return plan_program(self.graph_module, self.shapes).plan

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on tensors of any strides; the results are dense."""
        batch, dense, outputs = self._call(inputs)
        self.program.run(batch, dense, outputs)
        return tuple(outputs)

    def profile(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[int]]:
        """The same, and the nanoseconds of every step of the plan."""
        batch, dense, outputs = self._call(inputs)
        nanoseconds = self.program.profile(batch, dense, outputs)
        return tuple(outputs), nanoseconds

    def batches(self, inputs: Sequence[Tensor]) -> float:
        """How many times the samples that were planned `inputs` hold."""
        if self.batch is None:
            return 1.0
        return inputs[0].shape[0] / self.planned.inputs[0].shape[0]

    def _call(self, inputs: Sequence[Tensor]) -> tuple[int, list[Tensor], list[Tensor]]:
        dense = [x.detach().contiguous() for x in inputs]
        plan = self.planned
        batch = 1
        if plan.batch is not None:
            batch = dense[0].shape[0] * plan.batch // plan.inputs[0].shape[0]
        outputs = []
        for port in plan.outputs:
            shape = list(port.shape)
            if plan.batch is not None:
                shape[0] = shape[0] // plan.batch * batch
            outputs.append(torch.empty(shape, dtype=port.dtype))
        return batch, dense, outputs


@dataclass(frozen=True)
class PlannedProgram:
    """A plan with its memory, the C++ unit of its kernels, and the file that the unit runs."""

    plan: ProgramPlan
    arena: Arena
    unit: str
    data: bytes


def plan_program(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> PlannedProgram:
    """All of a native program but what the C++ compiler does."""
    plan = program_plan(graph_module, inputs)
    arena = place_buffers(plan)
    set_barriers(plan)
    unit = unit_text(step.kernel for step in plan.steps)
    return PlannedProgram(plan, arena, unit, to_bytes(plan, arena))


def compile_segment(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> CompiledSegment:
    """Plan, build and load a graph whose output is a tuple of tensors."""
    key = graph_key(graph_module, inputs)
    shapes = [torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x for x in inputs]
    planned = find(key)
    program = None if planned is None else _built_before(planned)
    was_planned = program is not None
    if planned is None or program is None:
        new = plan_program(graph_module, inputs)
        plan, arena = new.plan, new.arena
        path = stored(f"{hashlib.sha256(new.data).hexdigest()[:40]}.bin", new.data)
        kernels = tuple(sorted({step.kernel for step in plan.steps}))
        ports = (tuple(plan.inputs), tuple(plan.outputs))
        planned = Planned(kernels, path.name, *ports, plan.batch, arena.size, arena.total)
        keep(key, planned)
        program = Program(build(unit_text(kernels)), path)
    return CompiledSegment(program, planned, key, was_planned, graph_module, shapes)


def _built_before(planned: Planned) -> Program | None:
    """The program in the cache; None where it is missing or damaged, as its checksum says."""
    try:
        return Program(build(unit_text(planned.kernels)), cache_folder() / planned.program)
    except TargetError:
        return None


def program_plan(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> ProgramPlan:
    """For any batch where dimension 0 counts samples everywhere, else for these shapes alone."""
    batched = _planned_for_any_batch(graph_module, inputs)
    if batched is not None:
        return Planner(graph_module, batched, LOWERINGS, _PLANNED_BATCH).plan()
    return Planner(graph_module, propagate(graph_module, inputs), LOWERINGS, None).plan()


def _planned_for_any_batch(
    graph_module: fx.GraphModule, inputs: Sequence[Any]
) -> dict[fx.Node, Any] | None:
    def samples(number: int) -> list[Any]:
        return [
            torch.empty(number, *x.shape[1:], dtype=x.dtype, device="meta")
            if isinstance(x, Tensor)
            else x
            for x in inputs
        ]

    if any(isinstance(x, Tensor) and x.dim() == 0 for x in inputs):
        return None
    try:
        low = propagate(graph_module, samples(_PLANNED_BATCH))
        high = propagate(graph_module, samples(_PLANNED_BATCH + 1))
    except Exception:  # Whatever does not run with another batch is planned for its own.
        return None
    for node, value in low.items():
        if node.op in ("get_attr", "output"):
            continue
        if not _is_scaled(value, high[node], _PLANNED_BATCH, _PLANNED_BATCH + 1):
            return None
    return low
