"""From an integer graph and shapes to a plan: which kernels run on which memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.emitter import UnsupportedError
from fxquant.backends.native.memory import Memory
from fxquant.backends.native.patterns import Attention, find_attention
from fxquant.backends.native.steps import Port, Step
from fxquant.backends.native.values import Buffer, Value
from fxquant.kernels.calls import operator_arguments

OPS: Any = torch.ops.fxquant

__all__ = ["Lower", "Planner", "ProgramPlan", "UnsupportedError"]


@dataclass(eq=False)
class ProgramPlan:
    """Steps in order, the constants that they read, and what goes in and out."""

    steps: list[Step]
    constants: list[tuple[Buffer, bytes]]
    inputs: list[Port]
    outputs: list[Port]
    batch: int | None
    whole_batch: bool


class Planner(Memory):
    """Interprets an integer graph on meta tensors and writes down what kernels have to do.

    `batch` is the number of samples that the inputs are planned for, None where the graph mixes
    samples, so that its plan holds for these shapes alone.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        shapes: Mapping[fx.Node, Any],
        lowerings: Mapping[Any, Lower],
        batch: int | None,
    ) -> None:
        super().__init__(graph_module.graph, shapes, batch)
        self.source = graph_module
        self.lowerings = lowerings
        self.values: dict[fx.Node, Any] = {}
        self.whole_batch = False
        self.tables = _tables_behind(graph_module.graph)
        self.done: set[fx.Node] = set()
        # Quantizers that the kernel in front of them has applied, and what they are told.
        self.ready: dict[fx.Node, Value] = {}
        self.quantizers: dict[fx.Node, dict[str, Any]] = {}
        # Nodes that a kernel behind them computes as well.
        self.absorbed: dict[fx.Node, fx.Node] = {}
        self.attention: dict[fx.Node, Attention] = {}
        self.layouts.stands_for.update(self.tables)

    # -- the sweep -------------------------------------------------------------------------

    def plan(self) -> ProgramPlan:
        """Raises UnsupportedError for a node that no native kernel computes."""
        for node in self.source.graph.nodes:
            if node.target is OPS.weighted_mean.default:
                found = find_attention(node, self.shapes)
                if found is not None:
                    self.attention[node] = found
                    self.absorbed |= dict.fromkeys(found.inside, node)
        inputs: list[Port] = []
        outputs: list[Port] = []
        for node in self.source.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                tensor = self.shapes[node]
                if not isinstance(tensor, Tensor):
                    self.values[node] = tensor
                    continue
                meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                buffer = Buffer("input", meta.nbytes, port=len(inputs))
                self.values[node] = Value(meta, buffer)
                inputs.append(Port(meta.dtype, tuple(meta.shape)))
            elif node.op == "get_attr":
                self.values[node] = _attribute(self.source, str(node.target))
            elif node.op == "output":
                for index, source in enumerate(node.args[0]):
                    outputs.append(self._output(index, self.values[source]))
            elif not isinstance(self.shapes[node], Tensor) and not self._reads_tensors(node):
                self.values[node] = self.shapes[node]
            elif node in self.absorbed:
                self.values[node] = None
            elif self._is_constant(node):
                self.values[node] = self._computed(node)
            else:
                lower = self.lowerings.get(node.target)
                if lower is None:
                    raise UnsupportedError(node, "there is no native kernel for it")
                self.values[node] = lower(self, node)
        return ProgramPlan(
            self.steps,
            list(self.constants.values()),
            inputs,
            outputs,
            self.batch,
            self.whole_batch,
        )

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a node computes with constants alone."""
        values = [self.values[source] for source in node.all_input_nodes]
        tensors = [v for v in values if not isinstance(v, (int, float, tuple, list))]
        return bool(tensors) and all(isinstance(value, Tensor) for value in tensors)

    def _computed(self, node: fx.Node) -> Any:
        args: Any = fx.map_arg(node.args, self.values.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, self.values.__getitem__)
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            target: Any = node.target
            return target(*args, **kwargs)

    def _reads_tensors(self, node: fx.Node) -> bool:
        """Whether a result that is no tensor holds tensors: ``chunk`` does, ``size`` does not."""
        result = self.shapes[node]
        return isinstance(result, (tuple, list)) and any(isinstance(v, Tensor) for v in result)

    def _output(self, index: int, value: Any) -> Port:
        value = self.as_value(value)
        port = Port(value.dtype, value.shape)
        if value.buffer.place != "output" or value.buffer.port != index:
            meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
            target = Value(meta, Buffer("output", meta.nbytes, port=index))
            self.copy(value, target)
        return port

    # -- values ----------------------------------------------------------------------------

    def value(self, node: Any) -> Value:
        """What a node computes, as a tensor in a buffer."""
        return self.as_value(self.values[node])

    def as_value(self, value: Any) -> Value:
        """The same of what stands for a node: constants become part of the program."""
        if isinstance(value, Value):
            return value
        if isinstance(value, Tensor):
            # What broadcasts is stored once, so that it holds for any batch.
            kept = value
            for axis, stride in enumerate(value.stride()):
                if stride == 0 and value.shape[axis] > 1:
                    kept = kept.narrow(axis, 0, 1)
            meta = torch.empty(kept.shape, dtype=value.dtype, device="meta")
            return Value(meta.expand(value.shape), self.constant(kept))
        raise UnsupportedError(self.current, f"it reads {type(value).__name__}, which is no tensor")

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of an operator by name; numbers that come from shapes are computed."""

        def number(source: fx.Node) -> Any:
            found = self.values.get(source)
            return found if isinstance(found, (int, float)) else source

        return dict(fx.map_arg(operator_arguments(node), number))

    def tensor(self, node: Any) -> Tensor:
        """A constant that a lowering reads."""
        value = self.values[node]
        if not isinstance(value, Tensor):
            raise UnsupportedError(self.current, f"{node} is no constant")
        return value

    def table_behind(self) -> Tensor | None:
        """The table that alone reads the node at hand: a kernel that asks for it applies it."""
        lookup = self.tables.get(self.current)
        if lookup is None:
            return None
        self.done.add(lookup)
        arguments = operator_arguments(lookup)
        table: fx.Node = arguments["table"]
        return _attribute(self.source, str(table.target))

    def is_done(self, node: fx.Node) -> bool:
        """Whether a table has been applied by the kernel in front of it."""
        return node in self.done


def _attribute(module: fx.GraphModule, path: str) -> Tensor:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    assert isinstance(found, Tensor)
    return found


def _tables_behind(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The lookups that alone read what they read, by what that is."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is not OPS.lookup.default:
            continue
        source = operator_arguments(node)["x"]
        if len(source.users) == 1 and source.target in _WITH_TABLE:
            found[source] = node
    return found


_WITH_TABLE = (
    OPS.conv.default,
    OPS.linear.default,
    OPS.add.default,
    OPS.mul.default,
    OPS.channel_affine.default,
    OPS.avg_pool.default,
    OPS.adaptive_avg_pool.default,
    OPS.mean.default,
)

Lower = Callable[[Planner, fx.Node], Any]
"""Writes the steps of one node and returns its value."""
