"""The sweep from an integer graph to a graph of kernel calls, given a table of lowerings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.backends.x86 import kernels
from fxquant.meta import NODE_KEYS
from fxquant.to_integer import Grid
from passes.infra.meta import copy_meta

__all__ = ["Lower", "Lowered", "Lowering", "Plain", "first_of"]


@dataclass(frozen=True)
class _Value:
    """An integer value of the source graph: as a torch quantized tensor, as plain integers."""

    quantized: fx.Node | None
    plain: fx.Node | None


@dataclass(frozen=True)
class Plain:
    """What a lowering returns for a node that yields plain integers, not a quantized tensor."""

    node: fx.Node


class Lowering:
    """The x86 graph under construction, and the image in it of each integer value.

    `table` says how each operator is lowered where all its values have 8 bits, `wide` how where
    they need not; None, and every node named in `keep`, keeps the reference operator.
    """

    def __init__(
        self,
        integer: fx.GraphModule,
        table: Mapping[Any, Lower],
        wide: Mapping[Any, Lower],
        keep: frozenset[str],
    ) -> None:
        self.source = integer
        self.table = table
        self.wide = wide
        self.keep = keep
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, _Value] = {}
        self.others: dict[fx.Node, fx.Node] = {}
        self.centered: dict[fx.Node, fx.Node] = {}
        self.constants: dict[str, list[fx.Node]] = {}
        self.current: fx.Node = next(iter(integer.graph.nodes))

    def lower(self) -> fx.GraphModule:
        """Sweep over the integer graph."""
        for node in self.source.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                self.others[node] = self.graph.node_copy(node)
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.other))
            elif node.op == "get_attr":
                self._get_attr(node)
            elif "grid" in node.meta or _is_operator(node):
                self._integer_node(node)
            else:
                self._copy(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        module = fx.GraphModule(self.root, self.graph, "X86Graph")
        module.delete_all_unused_submodules()
        module.graph.lint()
        return module

    # -- building ------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call that stands for the current integer node."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=self.current.name)
        return self.annotate(node)

    def annotate(self, node: fx.Node) -> fx.Node:
        """Note which integer node a node stands for."""
        copy_meta(self.current, node, "place", "integers", table=NODE_KEYS)
        node.meta["integer"] = self.current.name
        return node

    def attribute(self, name: str, value: Any) -> fx.Node:
        """A constant of this graph: a tensor or a packed object, as a plain attribute.

        Plain attributes are found without `nn.Module.__getattr__`, which costs as much as a
        small kernel's dispatch.
        """
        name = self._free(name)
        setattr(self.root, name, value)
        node = self.graph.create_node("get_attr", name, (), {}, name=name)
        return self.annotate(node)

    def shared(self, name: str, make: Callable[[], Mapping[str, Any]]) -> list[fx.Node]:
        """Constants that several calls may read, made and named once: `name` and their keys."""
        if name not in self.constants:
            self.constants[name] = [
                self.attribute(f"{name}_{key}", value) for key, value in make().items()
            ]
        return self.constants[name]

    def _free(self, name: str) -> str:
        # The constants of node a_b may be called as those of module a.b are.
        while hasattr(self.root, name):
            name += "_"
        return name

    def tensor(self, node: fx.Node | None) -> Tensor | None:
        """The tensor that a get_attr node of the source graph reads."""
        if node is None:
            return None
        value: Any = self.source
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value

    def _get_attr(self, node: fx.Node) -> None:
        value = self.tensor(node)
        # Read lazily: what is packed must not be held a second time.
        constant = self.attribute(node.name, value)
        if "grid" in node.meta:
            self.values[node] = _Value(None, constant)
        else:
            self.others[node] = constant

    def _copy(self, node: fx.Node) -> None:
        if node.op == "call_module":
            path = str(node.target)
            module = self.source.get_submodule(path)
            name = self._free(path.replace(".", "_"))
            self.root.add_module(name, module)
            args = fx.map_arg(node.args, self.other)
            kwargs = dict(fx.map_arg(node.kwargs, self.other))
            copied = self.graph.create_node("call_module", name, args, kwargs, name=node.name)
        else:
            copied = self.graph.node_copy(node, self.movable)
        self.others[node] = self.annotate(copied)

    # -- values --------------------------------------------------------------------------

    def other(self, node: fx.Node) -> fx.Node:
        """A value as float operations read it."""
        return self.others[node] if node in self.others else self.plain(node)

    def movable(self, node: fx.Node) -> fx.Node:
        """For what reads shapes: either image of an integer value."""
        if node in self.others:
            return self.others[node]
        value = self.values[node]
        image = value.quantized or value.plain
        assert image is not None
        return image

    def quantized(self, node: fx.Node) -> fx.Node:
        """An integer value as a torch quantized tensor."""
        value = self.values[node]
        if value.quantized is None:
            assert value.plain is not None
            grid: Grid = node.meta["grid"]
            made = self.graph.call_function(kernels.as_quantized, (value.plain, *grid.input))
            value = _Value(made, value.plain)
            self.values[node] = value
        assert value.quantized is not None
        return value.quantized

    def plain(self, node: fx.Node) -> fx.Node:
        """An integer value as a plain integer tensor."""
        value = self.values[node]
        if value.plain is None:
            assert value.quantized is not None
            plain = self.graph.call_function(kernels.codes, (value.quantized,))
            value = _Value(value.quantized, plain)
            self.values[node] = value
        assert value.plain is not None
        return value.plain

    def is_plain(self, node: fx.Node) -> bool:
        """Whether an integer value is at hand as a plain integer tensor alone."""
        return self.values[node].quantized is None

    # -- nodes ---------------------------------------------------------------------------

    def _integer_node(self, node: fx.Node) -> None:
        eight_bits = all(
            source.meta["grid"].dtype == torch.uint8
            for source in (node, *node.all_input_nodes)
            if "grid" in source.meta
        )
        lower = self.wide.get(node.target) or (self.table.get(node.target) if eight_bits else None)
        lowered = None if lower is None or node.name in self.keep else lower(self, node)
        if lowered is None:
            self._keep_reference(node)
        elif isinstance(lowered, Plain):
            self.values[node] = _Value(None, lowered.node)
        elif "grid" in node.meta:
            self.values[node] = _Value(lowered, None)
        else:
            self.others[node] = lowered

    def _keep_reference(self, node: fx.Node) -> None:
        def operand(source: fx.Node) -> fx.Node:
            return self.plain(source) if source in self.values else self.others[source]

        kept = self.annotate(self.graph.node_copy(node, operand))
        kept.meta["kernel"] = "reference"
        if "grid" in node.meta:
            self.values[node] = _Value(None, kept)
        else:
            self.others[node] = kept

    def clamp(self, lowered: fx.Node, node: fx.Node, qmin: int, qmax: int) -> fx.Node:
        """Bounds that the 8-bit container of a quantized tensor does not already hold."""
        grid: Grid = node.meta["grid"]
        if qmin <= 0 and qmax >= 255:
            return lowered
        low, high = ((code - grid.zero_point) * grid.scale for code in (qmin, qmax))
        return self.emit(torch.clamp, lowered, low, high)

    def clamp_plain(self, lowered: fx.Node, qmin: int, qmax: int) -> Plain:
        """The same of plain uint8 codes."""
        if qmin <= 0 and qmax >= 255:
            return Plain(lowered)
        return Plain(self.emit(torch.clamp, lowered, qmin, qmax))


Lowered = fx.Node | Plain | None
Lower = Callable[[Lowering, fx.Node], Lowered]
"""How one operator is lowered; None where the kernels do not have it."""


def first_of(*candidates: Lower) -> Lower:
    """The first lowering that does not decline."""

    def lower(lowering: Lowering, node: fx.Node) -> Lowered:
        found = (candidate(lowering, node) for candidate in candidates)
        return next((lowered for lowered in found if lowered is not None), None)

    return lower


def _is_operator(node: fx.Node) -> bool:
    """Whether `node` calls one of our operators: those that end in float have no grid."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxquant"
