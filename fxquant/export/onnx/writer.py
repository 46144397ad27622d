"""The ONNX graph as it is written: nodes with the names of modules, constants, values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.errors import TargetError
from fxquant.export.onnx.options import OnnxOptions
from fxquant.export.onnx.shapes import Shape, Shapes, leaves
from fxquant.kernels.calls import operator_arguments
from passes.infra.base import module_path

__all__ = ["MICROSOFT", "OPSET", "TYPES", "Writer"]

OPSET = 21
MICROSOFT = "com.microsoft"
TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.uint64: ir.DataType.UINT64,
    torch.bool: ir.DataType.BOOL,
}


class Writer:
    """Writes the nodes that stand for one node of the integer graph after the other.

    `node` is the one at hand. With `observe` every integer tensor is an output; "lock_step": and
    whoever reads it reads a graph input ``NAME@ref`` instead.
    """

    def __init__(
        self, source: fx.GraphModule, shapes: Shapes, options: OnnxOptions, *, observe: str
    ) -> None:
        self.source = source
        self.shapes = shapes
        self.options = options
        self.observe = observe
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="fxquant")
        self._nodes = self.graph
        self.node: fx.Node = next(iter(source.graph.nodes))
        self.values: dict[fx.Node, Any] = {}
        self._names: Counter[str] = Counter()
        self._constants: dict[Any, ir.Value] = {}
        self._batch: ir.Value | None = None

    # -- reading the integer graph ---------------------------------------------------------

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the operator at hand by name."""
        return operator_arguments(self.node)

    def value(self, node: Any) -> ir.Value:
        """The value of an operand; constants become initializers when they are first read."""
        if not isinstance(node, fx.Node):
            raise self.refusal(f"its operand {node!r} is no tensor")
        if node not in self.values and node.op == "get_attr":
            self.values[node] = self.constant(self.tensor(node), str(node.target))
        found = self.values.get(node)
        if not isinstance(found, ir.Value):
            raise self.refusal(f"its operand {node.name} is no tensor")
        return found

    def tensor(self, node: Any) -> Tensor:
        """The constant of a get_attr node."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise self.refusal("its weight is computed, not stored")
        found: Any = self.source
        for part in str(node.target).split("."):
            found = getattr(found, part)
        assert isinstance(found, Tensor)
        return found.detach()

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """The sizes for one sample."""
        return self.shapes[node].sizes

    def refusal(self, why: str) -> TargetError:
        """Why the node at hand has no form in ONNX."""
        path = module_path(self.node)
        where = f"{self.node.name} of {path}" if path else self.node.name
        what: Any = self.node.target
        if self.node.op == "call_module":
            what = f"nn.{type(self.source.get_submodule(str(what))).__name__}"
        return TargetError(f"the network cannot be exported to ONNX: {where} ({what}): {why}")

    # -- writing ---------------------------------------------------------------------------

    def op(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node of one output, which is returned; an attribute that is None is left out."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """A node of several outputs."""
        path = module_path(self.node) or self.node.name
        name = self._unique(f"{path}/{kind}")
        values = [ir.Value(name=name if outputs == 1 else f"{name}:{i}") for i in range(outputs)]
        node = ir.node(
            kind,
            list(inputs),
            {key: value for key, value in attributes.items() if value is not None},
            domain=domain,
            outputs=values,
            name=name,
            metadata_props={"fxquant.node": self.node.name, "fxquant.module": path},
        )
        if domain:
            self.graph.opset_imports[domain] = 1
        self._nodes.append(node)
        return tuple(values)

    @contextmanager
    def body(self, inputs: int) -> Iterator[ir.Graph]:
        """The graph of one step of a loop, into which the nodes of the block are written.

        Its inputs are float32; constants are initializers of the network's graph.
        """
        name = self._unique(f"{self.node.name}_step")
        float32 = ir.TensorType(ir.DataType.FLOAT)
        values = [ir.Value(name=f"{name}:{i}", type=float32) for i in range(inputs)]
        outside, self._nodes = self._nodes, ir.Graph(values, [], nodes=[], name=name)
        try:
            yield self._nodes
        finally:
            self._nodes = outside

    def constant(self, value: Tensor, name: str) -> ir.Value:
        """An initializer; equal tensors of equal names are one."""
        array = value.detach().cpu().contiguous().numpy()
        key = (name, array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(array, name)
        return self._constants[key]

    def stored(self, array: Any, name: str) -> ir.Value:
        """An initializer of a type that torch has not; one for each name."""
        key = (name, "stored")
        if key not in self._constants:
            self._constants[key] = self._initializer(array, name)
        return self._constants[key]

    def scalar(self, value: float, dtype: torch.dtype) -> ir.Value:
        """A constant of shape []."""
        kind = str(dtype).removeprefix("torch.")
        return self.constant(torch.tensor(value, dtype=dtype), f"{kind}_{value:.9g}")

    def numbers(self, *values: int) -> ir.Value:
        """A constant of int64, one dimension."""
        name = "_".join(map(str, values)) if len(values) < 7 else "numbers"
        return self.constant(torch.tensor(values, dtype=torch.int64), f"int64_{name}")

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        """`x` in another type."""
        return self.op("Cast", x, to=int(TYPES[dtype]))

    def shape(self, sizes: Sequence[int], batched: Sequence[bool]) -> ir.Value:
        """A shape as a value: constant, or from the batch of the first input."""
        if not any(batched):
            return self.numbers(*sizes)
        if self._batch is None:
            self._batch = self.op("Shape", self.graph.inputs[0], start=0, end=1)
        parts = []
        for size, grows in zip(sizes, batched, strict=True):
            part = self.numbers(size)
            if grows:
                part = self._batch if size == 1 else self.op("Mul", self._batch, part)
            parts.append(part)
        return self.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def reshape(self, x: ir.Value, sizes: Sequence[int]) -> ir.Value:
        """`x` in another shape; -1 for what grows with the batch."""
        return self.op("Reshape", x, self.numbers(*sizes))

    def reshaped(self, x: ir.Value, node: fx.Node) -> ir.Value:
        """`x` in the shape of `node`."""
        return self.reshape(x, self.shapes[node].fixed)

    # -- values with the graph's names -----------------------------------------------------

    def input(self, node: fx.Node, name: str) -> ir.Value:
        """A graph input of the shape and type of `node`."""
        value = self._typed(ir.Value(name=name), self.shapes[node])
        self.graph.inputs.append(value)
        return value

    def bind(self, node: fx.Node, value: Any) -> None:
        """`value` is what `node` stands for, and has its name."""
        if not isinstance(value, ir.Value):
            self.values[node] = value
            return
        if value.producer() is None or "fxquant.value" in value.metadata_props:
            if not self.observe or self.shapes[node].dtype.is_floating_point:
                self.values[node] = value
                return
            value = self.op("Identity", value)
        self._typed(value, self.shapes[node]).name = self._unique(node.name)
        value.metadata_props["fxquant.value"] = node.name
        grid = node.meta.get("grid")
        if grid is not None:
            value.metadata_props["fxquant.scale"] = repr(grid.scale)
            value.metadata_props["fxquant.zero_point"] = str(grid.zero_point)
        self.values[node] = value
        dtype = self.shapes[node].dtype
        if self.observe and dtype != torch.bool and not dtype.is_floating_point:
            self.graph.outputs.append(value)
            if self.observe == "lock_step":
                self.values[node] = self.input(node, f"{node.name}@ref")

    def output(self, node: fx.Node) -> None:
        """The value of `node`, or each of its tuple, is an output of the network."""
        found = self.values.get(node)
        values = found if isinstance(found, tuple) else self.value(node)
        shapes = leaves(self.shapes.values[node.name])
        for value, shape in zip(leaves(values), shapes, strict=True):
            taken = any(value is other for other in self.graph.outputs)
            given = self.op("Identity", value) if value.producer() is None or taken else value
            self.graph.outputs.append(self._typed(given, shape))

    def _typed(self, value: ir.Value, shape: Shape) -> ir.Value:
        value.shape = ir.Shape(shape.names)
        value.type = ir.TensorType(TYPES[shape.dtype])
        return value

    def _initializer(self, array: Any, name: str) -> ir.Value:
        tensor = ir.tensor(array, name=self._unique(name))
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else self._unique(f"{name}_{count}")
