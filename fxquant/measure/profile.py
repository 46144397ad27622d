"""Where the time of a native program goes, by layer, and what bounds each of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.executor import CompiledSegment, propagate
from fxquant.backends.native.library import thread_count
from fxquant.backends.native.program_module import NativeProgram
from fxquant.backends.native.steps import Pointer, Step
from fxquant.compiled import CompiledModel
from fxquant.errors import InputError, TargetError
from fxquant.kernels.calls import operator_arguments
from fxquant.measure.tables import percent, table

__all__ = ["LayerTime", "Profile", "profile"]

OPS: Any = torch.ops.fxquant
_BY_OUTPUT = (
    OPS.conv.default,
    OPS.conv_accumulate.default,
    OPS.linear.default,
    OPS.linear_accumulate.default,
)
_BY_INPUT = (OPS.conv_transpose.default,)
_PRODUCTS = (OPS.matmul.default, OPS.matmul_accumulate.default, OPS.weighted_mean.default)

_MACS_PER_CYCLE = {"portable": 4, "avx2": 32, "avxvnni": 64, "avx512vnni": 128, "amx": 1024}
"""Of one core at most: lanes of 8-bit products in one instruction, times instructions a cycle."""
_USUAL_GHZ = 2.5
_EXPLAINED = 0.25


@dataclass(frozen=True)
class LayerTime:
    """One node of the integer graph, with all steps that stand for it.

    Attributes:
        node: its name in the integer graph; nodes that its kernel computes as well count for it.
        kernels: the native kernels that it runs on; ``python`` for a call of torch.
        nanoseconds: of one call of the network, the median.
        share: of the time of all layers, in [0, 1].
        macs: multiply-accumulates of one call.
        bytes: what its steps read and write: values, and constants such as weights.
        bound: ``multiply``, ``memory`` or ``other``, as `profile` decides.
    """

    node: str
    kernels: tuple[str, ...]
    nanoseconds: float
    share: float
    macs: int
    bytes: int
    bound: str


@dataclass(frozen=True)
class Profile:
    """Layers in execution order, and the peaks that they were compared with.

    `isa` is the instruction set, `gmacs_peak` in 10⁹ multiply-accumulates a second and
    `gbytes_peak` in 10⁹ bytes a second are estimates for all `threads`.
    """

    layers: tuple[LayerTime, ...]
    isa: str
    threads: int
    gmacs_peak: float
    gbytes_peak: float

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for ``json.dumps``."""
        return asdict(self)

    def __str__(self) -> str:
        """The layers, those that take longest first."""
        rows = [
            (
                layer.node,
                ", ".join(layer.kernels),
                percent(layer.share),
                f"{layer.nanoseconds / 1e3:.1f}",
                f"{layer.macs / layer.nanoseconds:.1f}" if layer.macs else "-",
                f"{layer.bytes / 1e3:.1f}",
                layer.bound,
            )
            for layer in sorted(self.layers, key=lambda layer: -layer.nanoseconds)
        ]
        headers = ("layer", "kernels", "time", "µs", "G MAC/s", "kB moved", "bound by")
        plural = "" if self.threads == 1 else "s"
        about = (
            f"{self.isa}, {self.threads} thread{plural}; peaks estimated as "
            f"{self.gmacs_peak:.0f} G MAC/s and {self.gbytes_peak:.0f} GB/s"
        )
        return f"{table(rows, headers, texts=2)}\n{about}"


def profile(q: CompiledModel, x: Tensor | Sequence[Any], *, calls: int = 10) -> Profile:
    """Time every step of a model of target native, and say what bounds each layer.

    A layer is bound by what would take longer at its peak: ``multiply`` for its
    multiply-accumulates, ``memory`` for the bytes that it moves. Where neither explains a quarter
    of the time that was measured it is ``other``: functions in float, loops too short, threads
    that wait. The peak of multiply-accumulates is what the instruction set does in a cycle on one
    core, times the clock of /proc/cpuinfo (2.5 GHz where it says none), times threads. That of
    memory is measured: torch copies as many bytes as the network's largest step moves, so that it
    is that of the cache which they fit into. Both are rough: shares of time are what to trust.

    Args:
        q: a model compiled for target native.
        x: a tensor, or the sequence of arguments.
        calls: how many calls are measured; a layer's time is the median.

    Raises:
        TargetError: another target.
        InputError: inputs that do not fit, or less than one call.
    """
    if q.target != "native":
        raise TargetError(
            f"only target native is profiled by layer, and the model is for {q.target!r}; "
            'compile it with target="native", or take q.to_target("native")'
        )
    if calls < 1:
        raise InputError(f"calls is {calls}; expected at least 1")
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    q(*inputs)
    recorder = _Recorder(q.stages["native"])
    with torch.no_grad():
        for _ in range(calls):
            recorder.run(*inputs)
    isas = [segment.program.isa for segment in recorder.segments]
    isa = isas[0] if isas else "portable"
    threads = thread_count()
    gmacs = _MACS_PER_CYCLE[isa] * _gigahertz() * threads
    costs = recorder.costs
    gbytes = _copied_in_a_nanosecond(max((cost.bytes for cost in costs.values()), default=1))
    medians = {key: statistics.median(cost.nanoseconds) for key, cost in costs.items()}
    total = sum(medians.values()) or 1.0
    layers = tuple(
        LayerTime(
            node=key[1],
            kernels=tuple(dict.fromkeys(cost.kernels)),
            nanoseconds=medians[key],
            share=medians[key] / total,
            macs=cost.macs,
            bytes=cost.bytes,
            bound=_bound(medians[key], cost.macs / gmacs, cost.bytes / gbytes),
        )
        for key, cost in costs.items()
    )
    return Profile(layers, isa, threads, gmacs, gbytes)


def _bound(measured: float, multiply: float, memory: float) -> str:
    if max(multiply, memory) < _EXPLAINED * measured:
        return "other"
    return "multiply" if multiply > memory else "memory"


class _Cost:
    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.nanoseconds: list[int] = []
        self.macs = 0
        self.bytes = 0


class _Recorder(fx.Interpreter):
    """Runs a native graph and adds up what every node costs, by part of the graph and name."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.costs: dict[tuple[str, str], _Cost] = {}
        self.segments: list[CompiledSegment] = []

    def run_node(self, n: fx.Node) -> Any:
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        args, _ = self.fetch_args_kwargs_from_env(n)
        if isinstance(module, NativeProgram):
            return self._native(n.name, module, args)
        begin = time.perf_counter_ns()
        result = super().run_node(n)
        if n.meta.get("kernel") == "reference":
            nanoseconds = time.perf_counter_ns() - begin
            name = str(n.meta["integer"])
            if (n.name, name) not in self.costs:
                cost = self.costs[n.name, name] = _Cost()
                cost.kernels = ["python"]
                cost.macs = _macs(n, {**self.env, n: result})
                tensors = [self.env[source] for source in n.all_input_nodes] + [result]
                cost.bytes = sum(v.nbytes for v in tensors if isinstance(v, Tensor))
            self.costs[n.name, name].nanoseconds.append(nanoseconds)
        return result

    def _native(self, part: str, module: NativeProgram, inputs: Sequence[Any]) -> Any:
        segment = module.prepare(inputs)
        outputs, times = segment.profile(*inputs)
        steps = segment.plan.steps
        if not any(key[0] == part for key in self.costs):
            self.segments.append(segment)
            self._describe(part, module.graph_module, segment, inputs)
        spent: dict[str, int] = {}
        for step, nanoseconds in zip(steps, times, strict=True):
            spent[step.node] = spent.get(step.node, 0) + nanoseconds
        for name, nanoseconds in spent.items():
            self.costs[part, name].nanoseconds.append(nanoseconds)
        return outputs

    def _describe(
        self,
        part: str,
        graph_module: fx.GraphModule,
        segment: CompiledSegment,
        inputs: Sequence[Any],
    ) -> None:
        """What does not change from call to call."""
        batches = segment.batches(inputs)
        for step in segment.plan.steps:
            cost = self.costs.setdefault((part, step.node), _Cost())
            cost.kernels.append(step.kernel)
            cost.bytes += _bytes(step, batches)
        shapes = propagate(graph_module, inputs)
        for node in graph_module.graph.nodes:
            macs = _macs(node, shapes)
            # The kernel of a node behind it computes what has no step of its own.
            while macs and (part, node.name) not in self.costs and node.users:
                node = next(iter(node.users))
            if macs:
                self.costs[part, node.name].macs += macs


def _bytes(step: Step, batches: float) -> int:
    """Of values, for as many batches as the plan's own, and of the constants that are read."""
    constants = {
        id(field.buffer): field.buffer.size
        for field in step.fields.values()
        if isinstance(field, Pointer) and field.buffer.place == "constant"
    }
    values = sum(
        value.tensor.nbytes
        for value in (*step.reads, *step.writes)
        if value.buffer.place != "constant"
    )
    return int(values * batches) + sum(constants.values())


def _macs(node: fx.Node, shapes: Mapping[fx.Node, Any]) -> int:
    """Multiply-accumulates of a node of an integer graph."""
    if node.target in _PRODUCTS:
        left = shapes[operator_arguments(node)["a"]]
        return int(math.prod(shapes[node].shape) * left.shape[-1])
    if node.target not in (*_BY_OUTPUT, *_BY_INPUT):
        return 0
    arguments = operator_arguments(node)
    weight = shapes[arguments["weight"]]
    each = shapes[arguments["x"]] if node.target in _BY_INPUT else shapes[node]
    return int(math.prod(each.shape) * math.prod(weight.shape[1:]))


def _gigahertz() -> float:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return _USUAL_GHZ
    found = [line.partition(":")[2] for line in text.splitlines() if line.startswith("cpu MHz")]
    return max(map(float, found)) / 1e3 if found else _USUAL_GHZ


def _copied_in_a_nanosecond(size: int) -> float:
    """Bytes read and written in a nanosecond by a copy that moves `size` bytes in all."""
    source = torch.zeros(max(size // 2, 1 << 14), dtype=torch.uint8)
    target = torch.empty_like(source)
    repeats = 20

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 2 * source.numel() * repeats / min(_nanoseconds(copy) for _ in range(3))


def _nanoseconds(call: Callable[[], None]) -> int:
    begin = time.perf_counter_ns()
    call()
    return max(1, time.perf_counter_ns() - begin)
