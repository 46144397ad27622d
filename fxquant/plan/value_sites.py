"""Which values pass through a quantizer, which of them share one, and with what spec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxquant.plan.node_recipe import NodeRecipe
from fxquant.plan.nonlinear import IntegerForm
from fxquant.plan.operations import Kind, data_operands, layer_of
from fxquant.plan.residual import ResidualStream
from fxquant.spec import QParams, QuantSpec
from passes import (
    FusedLayer,
    add_relu,
    is_depthwise,
    is_non_negative,
    softmax_numerators,
    tensor_info,
)
from passes.infra.walk import reached

__all__ = ["Decisions", "ValuePlanner", "ValueSite"]

_OWN_SCALE = (
    Kind.LAYER,
    Kind.AFFINE,
    Kind.PAIR,
    Kind.MATMUL,
    Kind.SOFTMAX,
    Kind.NORM,
    Kind.NORMALIZE,
    Kind.TABLE,
)
_SHARED_SCALE = (Kind.POOL, Kind.SELECT, Kind.MOVE)
_CARRIED_BITS = 8
_WIDE = QuantSpec(bits=16, scheme="symmetric", observer="min_max", reduce_range=True)
"""Half of the range is headroom: 16 bits have it to spare, and an outlier is not clipped."""


@dataclass(frozen=True)
class ValueSite:
    """One quantizer: its spec and the nodes whose values pass through it, in order.

    `channelwise`: only depthwise convolutions read the value, so that every channel may have its
    own scale. `fixed`: the grid that an integer form of the operation dictates.
    """

    path: str
    spec: QuantSpec
    nodes: tuple[str, ...]
    channelwise: bool = False
    fixed: QParams | None = None


@dataclass
class Decisions:
    """What is decided of the operations of a graph so far; see `fxquant.plan.plan.Plan`."""

    kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    weights: dict[fx.Node, QuantSpec] = field(default_factory=dict)
    forms: dict[fx.Node, IntegerForm] = field(default_factory=dict)

    def integer(self, node: fx.Node) -> bool:
        """Whether it is an operation that was not left in float."""
        return node in self.kinds and node not in self.reasons


class ValuePlanner:
    """The quantizers that integer operations need."""

    def __init__(self, ask: NodeRecipe, decided: Decisions, stream: ResidualStream) -> None:
        self.ask, self.decided, self.stream = ask, decided, stream

    def sites(self) -> tuple[ValueSite, ...]:
        """One for all values that share a scale, in order."""
        groups = _Groups()
        quantized: list[fx.Node] = []
        for node in self.ask.root.graph.nodes:
            if self._passes_through_quantizer(node):
                quantized.append(node)
                groups.add(node)
            if self.decided.integer(node) and self.decided.kinds[node] in _SHARED_SCALE:
                if self._has_own_grid(node):
                    continue
                for source in data_operands(node):
                    groups.join(node, source)
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in quantized:
            members.setdefault(groups.find(node), []).append(node)
        return tuple(
            ValueSite(
                path=f"quantizers.{nodes[0].name}",
                spec=self._widest(nodes),
                nodes=tuple(node.name for node in nodes),
                channelwise=len(nodes) == 1 and self._is_channelwise(nodes[0]),
                fixed=self._fixed(nodes),
            )
            for nodes in members.values()
        )

    def _passes_through_quantizer(self, node: fx.Node) -> bool:
        if tensor_info(node) is None or node.op == "output":
            return False
        feeds_integers = any(
            self.decided.integer(user) and node in data_operands(user) for user in node.users
        )
        if node.op == "get_attr" or not self.decided.integer(node):
            return feeds_integers and node.meta["tensor"].dtype.is_floating_point
        kind = self.decided.kinds[node]
        if kind in (Kind.LAYER, Kind.MATMUL) and not feeds_integers:
            return not self._may_leave_as_float(node)
        return kind in _OWN_SCALE or kind is Kind.POOL

    def _may_leave_as_float(self, node: fx.Node) -> bool:
        """Accumulators may be dequantized directly where nothing else happens to them."""
        # By arguments: a residual may be the very value that the layer reads.
        residual = self.decided.kinds[node] is Kind.LAYER and len(node.args) > 1
        return not self.ask.recipe.quantize_output and not residual

    def _is_channelwise(self, node: fx.Node) -> bool:
        """Whether a layer makes the value and depthwise convolutions alone read it."""
        if self.ask.recipe.activations.depthwise != "per_channel":
            return False
        if not (self.decided.integer(node) and self.decided.kinds[node] is Kind.LAYER):
            return False
        layer: Any = layer_of(node, self.ask.root)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return False
        return all(
            self.decided.integer(user)
            and user.args == (node,)
            and is_depthwise(layer_of(user, self.ask.root))
            for user in node.users
        )

    def _widest(self, nodes: Iterable[fx.Node]) -> QuantSpec:
        specs = [spec for node in nodes if (spec := self.spec(node)) is not None]
        return max(specs, key=lambda spec: spec.bits)

    def _fixed(self, nodes: list[fx.Node]) -> QParams | None:
        """The grid of a softmax whose form dictates one, where nothing else shares it."""
        if len(nodes) == 1 and nodes[0].target is softmax_numerators:
            # The largest of every row is exactly 1.
            spec = self.spec(nodes[0])
            top = 255 if spec is None else spec.qmax
            zero = torch.zeros(1, dtype=torch.int32)
            return QParams(torch.tensor([1 / top]), zero, 0, top, torch.uint8)
        form = self.decided.forms.get(nodes[0])
        return form.output if form is not None and len(nodes) == 1 else None

    def _has_own_grid(self, node: fx.Node) -> bool:
        """Whether an average is not to be rounded to the grid of what it averages.

        Values of both signs cancel: what is left of them takes few steps of that grid. Or the
        layer behind it asks for another one, as that of 8 bits behind a feature map of 4.
        """
        if self.decided.kinds[node] is not Kind.POOL:
            return False
        if not is_non_negative(node):
            return True
        asked = self._asked(node)
        return asked is not None and any(asked != self.spec(s) for s in data_operands(node))

    def _asked(self, node: fx.Node) -> QuantSpec | None:
        """What an `inputs` override of a layer says that reads the value, behind movement too.

        The most bits, where there are several.
        """
        readers = (user for moved in reached([node], self._moved) for user in moved.users)
        layers = [u for u in readers if u in self.decided.weights and self.decided.integer(u)]
        asked = [spec for layer in layers if (spec := self.ask.explicit_input(layer))]
        return max(asked, key=lambda spec: spec.bits, default=None)

    def _moved(self, node: fx.Node) -> list[fx.Node]:
        """The readers of a value that move or select it."""
        kinds = (Kind.MOVE, Kind.SELECT)
        return [u for u in node.users if self.decided.integer(u) and self.decided.kinds[u] in kinds]

    def spec(self, node: fx.Node) -> QuantSpec | None:
        """A consumer's explicit `inputs` override wins over what the producer says."""
        if self._is_wide(node):
            return _WIDE
        if (asked := self._asked(node)) is not None:
            return asked
        if node.op == "placeholder":
            return self.ask.recipe.spec_for_network_input()
        spec = self.ask.output(node)
        if spec is not None and self._is_carried(node):
            return replace(spec, bits=max(spec.bits, _CARRIED_BITS))
        if node.op == "get_attr" and spec is not None:
            # There is nothing to estimate: a constant's range is what it is.
            return replace(spec, observer="min_max", options=())
        if spec is not None:
            return spec
        # What makes the value stays float: the value is as its readers want it.
        readers = (user for user in node.users if self.decided.integer(user))
        return next((spec for user in readers if (spec := self.ask.input(user))), None)

    def _is_carried(self, node: fx.Node) -> bool:
        """Whether additions alone read what a layer makes, as one branch of a block.

        The papers quantize the sum and not its operands (BRECQ's and QDrop's code disables the
        quantizer behind such a layer). One operand is the accumulator of the layer that takes the
        addition in; the other one has to be codes, and gets as many levels as cost nothing.
        """
        layer = layer_of(node, self.ask.root)
        if layer is None or (isinstance(layer, FusedLayer) and layer.activation != "none"):
            return False
        if not self.decided.integer(node) or len(node.args) > 1 or self.ask.sets_output(node):
            return False
        return bool(node.users) and all(
            self.decided.integer(user) and node in _added(user, self.decided.kinds[user])
            for user in node.users
        )

    def _is_wide(self, node: fx.Node) -> bool:
        """Whether 16 bits hold the value: at 8 bits the inputs of layer norms collapse."""
        if node in self.stream.values and self.ask.operations(node).residual == 16:
            return True
        return any(
            self.decided.integer(user)
            and self.decided.kinds[user] is Kind.NORM
            and self.ask.operations(user).residual != 8
            for user in node.users
            if user in self.decided.kinds
        )


def _added(node: fx.Node, kind: Kind) -> tuple[Any, ...]:
    """What `node` adds to something and does nothing else with."""
    if kind is Kind.LAYER:
        return tuple(operand for operand in node.args[1:] if operand is not node.args[0])
    return node.args[:2] if node.target in (torch.add, add_relu) else ()


class _Groups:
    """Union-find over nodes; the representative is the one that was added first."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        self.parent.setdefault(node, node)

    def find(self, node: fx.Node) -> fx.Node:
        self.add(node)
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        left, right = self.find(a), self.find(b)
        if left is not right:
            self.parent[left] = right
