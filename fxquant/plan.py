"""Recipe × graph → for every operation int8 or a reason, for every value a spec.

The plan changes nothing. It says
- of each operation whether it runs on integers, and if not, why;
- of each value that integer operations exchange which quantizer it passes through; values that
  concatenation, pooling or reshaping tie together share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from fxquant.dynamic import check_dynamic, dynamic_refusal
from fxquant.forms import Form, form_of
from fxquant.operations import Kind, classify, data_operands, is_curved, layer_of
from fxquant.recipe import OperationRecipe, Recipe
from fxquant.residual import ResidualStream
from fxquant.spec import QParams, QuantSpec
from passes import is_depthwise, module_path, softmax_numerators, tensor_info

__all__ = ["Plan", "ValueSite", "make_plan"]

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
_QUANTIZES_OPERANDS = (Kind.MATMUL, Kind.SOFTMAX, Kind.NORM, Kind.NORMALIZE)
"""Beside layers: worth integers even where what they read was float."""
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


@dataclass(frozen=True)
class Plan:
    """What is quantized and how. All keys are node names.

    `kinds`: every operation's kind. `reasons`: why an operation stays float.
    `values`: the quantizers. `weights`: the weight spec of each quantized layer. `dynamic`: the
    layers whose inputs are quantized at run time. `forms`: how softmax, GELU, layer norms and
    divisions by the norm compute on integers; `requantization` is the recipe's.
    """

    kinds: dict[str, Kind]
    reasons: dict[str, str]
    values: tuple[ValueSite, ...]
    weights: dict[str, QuantSpec] = field(default_factory=dict)
    dynamic: frozenset[str] = frozenset()
    forms: dict[str, Form] = field(default_factory=dict)
    requantization: Literal["float", "dyadic"] = "float"

    def runs_on_integers(self, node: fx.Node) -> bool:
        """Whether `node` is an operation that was not left in float."""
        return node.name in self.kinds and node.name not in self.reasons


def make_plan(graph_module: fx.GraphModule, recipe: Recipe) -> Plan:
    """Decide for every node and value of an annotated, fused graph what `recipe` makes of it.

    Raises RecipeError where a selector of the recipe matches nothing in the graph.
    """
    return _Planner(graph_module, recipe).plan()


class _Planner:
    def __init__(self, graph_module: fx.GraphModule, recipe: Recipe) -> None:
        self.root: nn.Module = graph_module
        self.recipe = recipe
        self.nodes = list(graph_module.graph.nodes)
        self.kinds: dict[fx.Node, Kind] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.weights: dict[fx.Node, QuantSpec] = {}
        self.forms: dict[fx.Node, Form] = {}
        self.stream = ResidualStream(graph_module)
        self.layers = [node for node in self.nodes if layer_of(node, self.root) is not None]
        self.first_layer = self.layers[0] if self.layers else None
        self.last_layer = self.layers[-1] if self.layers else None

    def plan(self) -> Plan:
        if self.recipe.dynamic:
            return self._dynamic_plan()
        self._decide_forwards()
        self._follow_consumers()
        for node in self.reasons:
            self.forms.pop(node, None)
        sites = self._sites()
        return Plan(
            kinds={node.name: kind for node, kind in self.kinds.items()},
            reasons={node.name: reason for node, reason in self.reasons.items()},
            values=sites,
            weights={node.name: spec for node, spec in self.weights.items()},
            forms={node.name: form for node, form in self.forms.items()},
            requantization=self.recipe.requantization,
        )

    def _dynamic_plan(self) -> Plan:
        """Linear and recurrent layers with their weights; everything else stays float."""
        check_dynamic(self.recipe, None)
        started = not self.recipe.start_at
        for node in self.nodes:
            operation = classify(node, self.root)
            if node.op in ("placeholder", "get_attr", "output") or operation.kind is Kind.SHAPE:
                continue
            path = module_path(node)
            where = (path, self._type_name(node), self._position(node))
            started = started or self.recipe.starts_at(path)
            self.kinds[node] = operation.kind
            if refusal := dynamic_refusal(node, self.root):
                self.reasons[node] = refusal
            elif not started:
                self.reasons[node] = f"quantization starts at {self.recipe.start_at!r}"
            elif self.recipe.keeps_float(*where):
                self.reasons[node] = "the recipe keeps it in float"
            elif (weight := self.recipe.spec_for_weight(*where)) is None:
                self.reasons[node] = "the recipe keeps its weights in float"
            else:
                check_dynamic(self.recipe, weight)
                self.kinds[node] = Kind.LAYER
                self.weights[node] = weight
        return Plan(
            kinds={node.name: kind for node, kind in self.kinds.items()},
            reasons={node.name: reason for node, reason in self.reasons.items()},
            values=(),
            weights={node.name: spec for node, spec in self.weights.items()},
            dynamic=frozenset(node.name for node in self.weights),
        )

    # -- operations ------------------------------------------------------------------------

    def _decide_forwards(self) -> None:
        started = not self.recipe.start_at
        for node in self.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            path = module_path(node)
            started = started or self.recipe.starts_at(path)
            operation = classify(node, self.root)
            if operation.kind is Kind.SHAPE:
                continue
            self.kinds[node] = operation.kind
            if operation.kind is Kind.FLOAT:
                self.reasons[node] = operation.reason
            elif foreign := self._foreign_type(node):
                self.reasons[node] = foreign
            elif not started:
                self.reasons[node] = f"quantization starts at {self.recipe.start_at!r}"
            elif self.recipe.keeps_float(path, self._type_name(node), self._position(node)):
                self.reasons[node] = "the recipe keeps it in float"
            elif operation.kind is Kind.LAYER:
                self._decide_layer(node, path)
            elif self._activation_spec(node) is None:
                self.reasons[node] = "the recipe keeps activations in float"
            elif kept := self._kept_by_operation(node):
                self.reasons[node] = f"the recipe keeps {kept} in float"
            elif operation.kind not in _QUANTIZES_OPERANDS:
                floats = [s for s in self._operands(node) if not self._may_be_integer(s, node)]
                if floats:
                    self.reasons[node] = f"its operand {floats[0].name} is float"

    def _may_be_integer(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether an operation that only adds or moves can have integers of its operand."""
        # The integers of a constant are made when the model is compiled. Those of an input are
        # worth a quantizer where its residual stream begins with it.
        stream = source.op == "placeholder" and node in self.stream.additions
        alone = source.op == "placeholder" and self.recipe.requantization == "dyadic"
        return source.op == "get_attr" or stream or alone or self._integer(source)

    def _kept_by_operation(self, node: fx.Node) -> str:
        """What the recipe's table of operations keeps in float; else the form is noted."""
        kind, operations = self.kinds[node], self._operations(node)
        if node in self.stream.additions and operations.residual == "float":
            return "the residual stream"
        if kind is Kind.TABLE and is_curved(node) and operations.functions == "float":
            return str(getattr(node.target, "__name__", node.target))
        form = form_of(node, kind, operations)
        if form is None:
            return ""
        if form.method == "float":
            return form.operation
        self.forms[node] = form
        return ""

    def _foreign_type(self, node: fx.Node) -> str:
        """Why codes cannot stand for the values: only float32 values are what a grid means."""
        for value in (*self._operands(node), node):
            info = tensor_info(value)
            if info is not None and info.dtype != torch.float32:
                return f"{value.name} holds {str(info.dtype).removeprefix('torch.')}, not float32"
        return ""

    def _decide_layer(self, node: fx.Node, path: str) -> None:
        weight = self.recipe.spec_for_weight(path, self._type_name(node), self._position(node))
        if weight is not None:
            self.weights[node] = weight
        if weight is None:
            self.reasons[node] = "the recipe keeps its weights in float"
        elif self._activation_spec(node) is None or self._input_spec(node) is None:
            self.reasons[node] = "the recipe keeps activations in float"
        elif any(self._is_float_input(source) for source in self._operands(node)):
            self.reasons[node] = "the recipe keeps the model's inputs in float"
        elif any(source.op == "get_attr" for source in self._operands(node)):
            self.reasons[node] = "it reads a constant: nothing changes at run time"

    def _is_float_input(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and self._value_spec(node) is None

    def _follow_consumers(self) -> None:
        """What gains nothing from integers that are only made for it.

        That is movement and averages in front of float operations; and the arithmetic between an
        accumulator and a softmax, a layer norm or a residual stream that stays in float.
        """
        for node in reversed(self.nodes):
            kind = self.kinds.get(node)
            if node in self.reasons or any(self._integer(user) for user in node.users):
                continue
            if kind in (Kind.MOVE, Kind.POOL):
                follows = not self.recipe.quantize_output
            else:
                follows = kind in (Kind.PAIR, Kind.TABLE, Kind.SELECT) and any(
                    user in self.stream.additions
                    or self.kinds.get(user) in (Kind.SOFTMAX, Kind.NORM, Kind.NORMALIZE)
                    for user in node.users
                )
            if follows:
                self.reasons[node] = "its consumers are float"

    def _integer(self, node: fx.Node) -> bool:
        return node in self.kinds and node not in self.reasons

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return data_operands(node)

    # -- values ----------------------------------------------------------------------------

    def _sites(self) -> tuple[ValueSite, ...]:
        groups = _Groups()
        quantized: list[fx.Node] = []
        for node in self.nodes:
            if self._passes_through_quantizer(node):
                quantized.append(node)
                groups.add(node)
            if self._integer(node) and self.kinds[node] in _SHARED_SCALE:
                for source in self._operands(node):
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
            self._integer(user) and node in self._operands(user) for user in node.users
        )
        if node.op == "get_attr" or not self._integer(node):
            return feeds_integers and node.meta["tensor"].dtype.is_floating_point
        kind = self.kinds[node]
        if kind in (Kind.LAYER, Kind.MATMUL) and not feeds_integers:
            return not self._may_leave_as_float(node)
        return kind in _OWN_SCALE or kind is Kind.POOL

    def _may_leave_as_float(self, node: fx.Node) -> bool:
        """Accumulators may be dequantized directly where nothing else happens to them."""
        # By arguments: a residual may be the very value that the layer reads.
        residual = self.kinds[node] is Kind.LAYER and len(node.args) > 1
        return not self.recipe.quantize_output and not residual

    def _is_channelwise(self, node: fx.Node) -> bool:
        """Whether a layer makes the value and depthwise convolutions alone read it."""
        if self.recipe.activations.depthwise != "per_channel":
            return False
        if not (self._integer(node) and self.kinds[node] is Kind.LAYER):
            return False
        layer: Any = layer_of(node, self.root)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return False
        return all(
            self._integer(user) and user.args == (node,) and is_depthwise(layer_of(user, self.root))
            for user in node.users
        )

    def _widest(self, nodes: Iterable[fx.Node]) -> QuantSpec:
        specs = [spec for node in nodes if (spec := self._value_spec(node)) is not None]
        return max(specs, key=lambda spec: spec.bits)

    def _fixed(self, nodes: list[fx.Node]) -> QParams | None:
        """The grid of a softmax whose form dictates one, where nothing else shares it."""
        if len(nodes) == 1 and nodes[0].target is softmax_numerators:
            # The largest of every row is exactly 1.
            spec = self._value_spec(nodes[0])
            top = 255 if spec is None else spec.qmax
            zero = torch.zeros(1, dtype=torch.int32)
            return QParams(torch.tensor([1 / top]), zero, 0, top, torch.uint8)
        form = self.forms.get(nodes[0])
        return form.output if form is not None and len(nodes) == 1 else None

    def _value_spec(self, node: fx.Node) -> QuantSpec | None:
        """A consumer's explicit `inputs` override wins over what the producer says."""
        if self._is_wide(node):
            return _WIDE
        for user in node.users:
            if user in self.weights and self._integer(user):
                spec = self.recipe.input_override(
                    module_path(user), self._type_name(user), self._position(user)
                )
                if spec is not None:
                    return spec
        if node.op == "placeholder":
            return self.recipe.spec_for_network_input()
        spec = self._activation_spec(node)
        if node.op == "get_attr" and spec is not None:
            # There is nothing to estimate: a constant's range is what it is.
            return replace(spec, observer="min_max", options=())
        if spec is not None:
            return spec
        # What makes the value stays float: the value is as its readers want it.
        readers = (user for user in node.users if self._integer(user))
        return next((spec for user in readers if (spec := self._input_spec(user))), None)

    def _is_wide(self, node: fx.Node) -> bool:
        """Whether 16 bits hold the value: at 8 bits the inputs of layer norms collapse."""
        if node in self.stream.values and self._operations(node).residual == 16:
            return True
        return any(
            self._integer(user)
            and self.kinds[user] is Kind.NORM
            and self._operations(user).residual != 8
            for user in node.users
            if user in self.kinds
        )

    def _operations(self, node: fx.Node) -> OperationRecipe:
        return self.recipe.operations_for(
            module_path(node), self._type_name(node), self._position(node)
        )

    def _activation_spec(self, node: fx.Node) -> QuantSpec | None:
        return self.recipe.spec_for_output(
            module_path(node), self._type_name(node), self._position(node)
        )

    def _input_spec(self, node: fx.Node) -> QuantSpec | None:
        return self.recipe.spec_for_input(
            module_path(node), self._type_name(node), self._position(node)
        )

    def _type_name(self, node: fx.Node) -> str:
        layer = layer_of(node, self.root)
        if layer is not None:
            return type(layer).__name__
        if node.op == "call_module":
            return type(self.root.get_submodule(str(node.target))).__name__
        return str(getattr(node.target, "__name__", node.target))

    def _position(self, node: fx.Node) -> str:
        if node is self.first_layer:
            return "first"
        return "last" if node is self.last_layer else ""


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
