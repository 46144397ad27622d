"""From an integer graph and shapes to a plan: which kernels run on which memory."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.layouts import Layouts
from fxquant.backends.native.patterns import Attention, find_attention
from fxquant.backends.native.steps import Count, Pointer, Step
from fxquant.backends.native.values import Border, Buffer, Loops, Value
from fxquant.kernels.calls import operator_arguments

OPS: Any = torch.ops.fxquant

__all__ = ["Lower", "Plan", "Planner", "Port", "UnsupportedError"]

_RANK = 6
_IMAGE = ("batch", "row", "pixel", "channel")


class UnsupportedError(Exception):
    """A node that no native kernel computes: it runs in Python, between two native segments."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{node.name}: {why}")
        self.node = node
        self.why = why


@dataclass(frozen=True)
class Port:
    """An input or output of a program: a dense tensor of the caller."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(eq=False)
class Plan:
    """Steps in order, the constants that they read, and what goes in and out."""

    steps: list[Step]
    constants: list[tuple[Buffer, bytes]]
    inputs: list[Port]
    outputs: list[Port]
    batch: int | None
    whole_batch: bool


class Planner:
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
        self.source = graph_module
        self.shapes = shapes
        self.lowerings = lowerings
        self.batch = batch
        self.layouts = Layouts(graph_module.graph, shapes)
        self.values: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        self.constants: dict[bytes, tuple[Buffer, bytes]] = {}
        self.current: fx.Node = next(iter(graph_module.graph.nodes))
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

    @property
    def batched(self) -> bool:
        """Whether dimension 0 counts samples everywhere."""
        return self.batch is not None

    # -- the sweep -------------------------------------------------------------------------

    def plan(self) -> Plan:
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
        return Plan(
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

    def constant(self, value: Tensor) -> Buffer:
        """A tensor that goes into the file; equal ones go there once."""
        data = value.detach().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        key = hashlib.sha256(raw).digest()
        if key not in self.constants:
            self.constants[key] = (Buffer("constant", len(raw)), raw)
        return self.constants[key][0]

    def numbers(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Pointer:
        """A table of integers among the constants."""
        return Pointer(self.constant(torch.tensor(list(values), dtype=dtype)))

    def data(self, value: Tensor) -> Pointer:
        """The address of a constant."""
        return Pointer(self.constant(value))

    @staticmethod
    def at(value: Value) -> Pointer:
        """The address of a value's first element."""
        return Pointer(value.buffer, value.offset)

    def count(self, number: int) -> Count | int:
        """Of samples: it grows with the batch, where the plan is for any batch."""
        return Count(number // self.batch) if self.batch is not None else number

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

    # -- memory ----------------------------------------------------------------------------

    def allocate(self, follow: Value | None = None) -> Value:
        """Memory for the result of the node at hand: its place in a concatenation, or its own.

        Images have their channels innermost, and the border that their readers ask for; other
        results follow the order of dimensions of `follow`.
        """
        node = self.current
        like = self.shapes[node]
        wanted = self.layouts.place(node)
        if wanted is not None:
            self._fill_border(wanted, node)
            return wanted
        value = self.layouts.fresh(node, like, follow)
        self._fill_border(value, node)
        return value

    @contextlib.contextmanager
    def standing_for(self, node: fx.Node) -> Iterator[None]:
        """Allocate for another node than the one at hand."""
        before, self.current = self.current, node
        try:
            yield
        finally:
            self.current = before

    def ordered(self, like: Tensor, follow: Value) -> Value:
        """Memory of its own, dense, in the order of the dimensions of `follow`."""
        order = sorted(range(like.dim()), key=lambda d: (d > 0, -follow.strides[d]))
        meta = torch.empty([like.shape[d] for d in order], dtype=like.dtype, device="meta")
        back = sorted(range(like.dim()), key=order.__getitem__)
        return Value(meta.permute(back), Buffer("arena", meta.nbytes))

    def dense(self, like: Tensor) -> Value:
        """Memory of its own, in the order of the dimensions."""
        meta = torch.empty(like.shape, dtype=like.dtype, device="meta")
        return Value(meta, Buffer("arena", meta.nbytes))

    def bordered(
        self, shape: Sequence[int], dtype: torch.dtype, border: Border, zero: int
    ) -> Value:
        """An image with a border that holds `zero`."""
        value = self.layouts.image(shape, dtype, border)
        self._fill(value.buffer, zero)
        return value

    def _fill_border(self, value: Value, node: fx.Node) -> None:
        if value.buffer.border and value.buffer.filled is None:
            self._fill(value.buffer, self.layouts.zero_point(node))

    def _fill(self, buffer: Buffer, zero: int) -> None:
        image = buffer.image
        buffer.filled = zero
        if image is None or not buffer.border:
            return
        value = Value(image, buffer)
        samples, _, height, width = image.shape
        batch, _, row, pixel = (stride * image.itemsize for stride in image.stride())
        if image.itemsize != 1:
            raise UnsupportedError(self.current, "borders are of 8-bit codes")
        self.emit(
            "fill_border",
            {
                "y": self.at(value),
                "y_batch": batch,
                "y_row": row,
                "y_pixel": pixel,
                "batch": self.count(samples),
                "height": height,
                "width": width,
                "rows": buffer.border.rows,
                "columns": buffer.border.columns,
                "value": zero,
            },
            reads=(),
            writes=(value,),
            work=0.05 * (buffer.size - image.numel()) / (self.batch or 1),
            is_border=True,
        )

    def copy(self, source: Value, target: Value) -> None:
        """Element by element, from one layout to another."""
        if source.dtype.itemsize == 1 and self._copy_bytes(source, target):
            return
        loops = self.loops(target.shape, target.strides, source.strides)
        if loops is None:
            raise UnsupportedError(self.current, "a tensor of too many dimensions")
        shape, y_strides, x_strides = loops
        fields = {
            "x": self.at(source),
            "y": self.at(target),
            "shape": shape,
            "x_strides": x_strides,
            "y_strides": y_strides,
            "samples": self.samples(target),
            "size": source.dtype.itemsize,
        }
        self.emit("plain_copy", fields, (source,), (target,), 1.0 * math.prod(target.shape))

    def _copy_bytes(self, source: Value, target: Value) -> bool:
        if not target.tensor.numel() or (self.batched and not target.shape):
            return False
        rows = [target.strides, source.strides]
        padded = Loops.of(target.shape, rows, self.batched).padded(4, self.batched)
        if padded is None or max(padded.sizes) >= 2**31:
            return False
        fields: dict[str, Any] = {
            "batch": self.count(padded.sizes[0]) if self.batched else padded.sizes[0],
            "height": padded.sizes[1],
            "width": padded.sizes[2],
            "channels": padded.sizes[3],
        }
        for name, value, row in zip("yx", (target, source), padded.strides, strict=True):
            fields[name] = self.at(value)
            fields |= zip((f"{name}_{key}" for key in _IMAGE), row, strict=True)
        self.emit("copy", fields, (source,), (target,), 0.3 * math.prod(target.shape))
        return True

    # -- steps -----------------------------------------------------------------------------

    def samples(self, value: Value) -> Count | int:
        """The length of the outermost loop of a plain kernel."""
        return self.count(value.shape[0]) if self.batched else 1

    def loops(self, shape: Sequence[int], *strides: Sequence[int]) -> tuple[Pointer, ...] | None:
        """Shape and strides for a plain kernel: the first strides say the order of the loops."""
        loops = Loops.of(shape, strides, self.batched)
        if not self.batched:
            loops = Loops([1, *loops.sizes], [[0, *row] for row in loops.strides])
        padded = loops.padded(_RANK, True)
        if padded is None:
            return None
        # Work is split over dimension 1, where there is any: loops of size 1 belong behind it.
        sizes, rows = _outermost_first(padded.sizes, padded.strides)
        return (self.numbers(sizes), *(self.numbers(row) for row in rows))

    def emit(
        self,
        kernel: str,
        fields: Mapping[str, Any],
        reads: Sequence[Value],
        writes: Sequence[Value],
        work: float,
        *,
        is_border: bool = False,
    ) -> None:
        """Add a step; `work` is an estimate of its nanoseconds for all samples planned."""
        self.steps.append(
            Step(
                kernel,
                fields,
                tuple(reads),
                tuple(writes),
                self.current.name,
                work / (self.batch or 1) if not is_border else work,
                is_border,
            )
        )


def _outermost_first(
    sizes: list[int], strides: list[list[int]]
) -> tuple[list[int], list[list[int]]]:
    """Dimensions of size 1 move behind the first that is longer."""
    ones = [d for d in range(1, len(sizes) - 1) if sizes[d] == 1]
    rest = [d for d in range(1, len(sizes)) if d not in ones]
    order = [0, *rest[:-1], *ones, rest[-1]]
    return [sizes[d] for d in order], [[row[d] for d in order] for row in strides]


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
