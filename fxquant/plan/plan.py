"""Recipe × graph → for every operation int8 or a reason, for every value a spec.

The plan changes nothing. It says
- of each operation whether it runs on integers, and if not, why;
- of each value that integer operations exchange which quantizer it passes through; values that
  concatenation, pooling or reshaping tie together share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.errors import CompileError
from fxquant.plan.dynamic import check_dynamic, dynamic_refusal, recurrent_of
from fxquant.plan.integers_only import between_integers, refuse_floats
from fxquant.plan.node_recipe import NodeRecipe
from fxquant.plan.nonlinear import IntegerForm, form_of
from fxquant.plan.operations import Kind, classify, data_operands, is_curved
from fxquant.plan.residual import ResidualStream
from fxquant.plan.value_sites import Decisions, ValuePlanner, ValueSite
from fxquant.recipe import Recipe
from fxquant.spec import QuantSpec
from passes import module_path, tensor_info

__all__ = ["Plan", "make_plan"]

_QUANTIZES_OPERANDS = (Kind.MATMUL, Kind.SOFTMAX, Kind.NORM, Kind.NORMALIZE)
"""Beside layers: worth integers even where what they read was float."""


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
    forms: dict[str, IntegerForm] = field(default_factory=dict)
    requantization: Literal["float", "dyadic"] = "float"

    def runs_on_integers(self, node: fx.Node) -> bool:
        """Whether `node` is an operation that was not left in float."""
        return node.name in self.kinds and node.name not in self.reasons

    def check(self, graph: fx.Graph) -> None:
        """Raise CompileError where the plan names a node that `graph` does not have."""
        values = (name for site in self.values for name in site.nodes)
        there = {node.name for node in graph.nodes}
        names = (*self.kinds, *values, *self.weights, *self.dynamic, *self.forms)
        if missing := [name for name in dict.fromkeys(names) if name not in there]:
            raise CompileError(
                f"plan: the graph has no nodes {', '.join(missing[:3])} ({len(missing)} of "
                f"{len(set(names))} names): make the plan of the graph that it is used with"
            )


def make_plan(graph_module: fx.GraphModule, recipe: Recipe) -> Plan:
    """Decide for every node and value of an annotated, fused graph what `recipe` makes of it.

    Raises RecipeError where a selector of the recipe matches nothing in the graph, CompileError
    where integers alone are asked for and an operation between integers has to stay float.
    """
    return _Planner(graph_module, recipe).plan()


class _Planner:
    def __init__(self, graph_module: fx.GraphModule, recipe: Recipe) -> None:
        self.root: nn.Module = graph_module
        self.recipe = recipe
        self.nodes = list(graph_module.graph.nodes)
        self.decided = Decisions()
        self.dynamic: set[str] = set()
        self.stream = ResidualStream(graph_module)
        self.ask = NodeRecipe(graph_module, recipe)
        self.values = ValuePlanner(self.ask, self.decided, self.stream)

    def plan(self) -> Plan:
        if self.recipe.dynamic:
            return self._dynamic_plan()
        self._decide_forwards()
        self._follow_consumers()
        sites = self.values.sites()
        if self.recipe.requantization == "dyadic":
            while self._refuse_wide(sites):
                sites = self.values.sites()
            self._check_integers_only()
        for node in self.decided.reasons:
            self.decided.forms.pop(node, None)
        return Plan(
            kinds={node.name: kind for node, kind in self.decided.kinds.items()},
            reasons={node.name: reason for node, reason in self.decided.reasons.items()},
            values=sites,
            weights={node.name: spec for node, spec in self.decided.weights.items()},
            dynamic=frozenset(self.dynamic),
            forms={node.name: form for node, form in self.decided.forms.items()},
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
            started = started or self.recipe.starts_at(path)
            self.decided.kinds[node] = operation.kind
            if refusal := dynamic_refusal(node, self.root):
                self.decided.reasons[node] = refusal
            elif not started:
                self.decided.reasons[node] = f"quantization starts at {self.recipe.start_at!r}"
            elif self.ask.keeps_float(node):
                self.decided.reasons[node] = "the recipe keeps it in float"
            elif (weight := self.ask.weight(node)) is None:
                self.decided.reasons[node] = "the recipe keeps its weights in float"
            else:
                check_dynamic(self.recipe, weight)
                self.decided.kinds[node] = Kind.LAYER
                self.decided.weights[node] = weight
        return Plan(
            kinds={node.name: kind for node, kind in self.decided.kinds.items()},
            reasons={node.name: reason for node, reason in self.decided.reasons.items()},
            values=(),
            weights={node.name: spec for node, spec in self.decided.weights.items()},
            dynamic=frozenset(node.name for node in self.decided.weights),
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
            self.decided.kinds[node] = operation.kind
            if operation.kind is Kind.FLOAT:
                self.decided.reasons[node] = self._decide_recurrent(node, started, operation.reason)
            elif operation.alone and self.recipe.requantization == "dyadic":
                self.decided.reasons[node] = operation.alone
            elif foreign := self._foreign_type(node):
                self.decided.reasons[node] = foreign
            elif not started:
                self.decided.reasons[node] = f"quantization starts at {self.recipe.start_at!r}"
            elif self.ask.keeps_float(node):
                self.decided.reasons[node] = "the recipe keeps it in float"
            elif operation.kind is Kind.LAYER:
                self._decide_layer(node)
            elif self.ask.output(node) is None:
                self.decided.reasons[node] = "the recipe keeps activations in float"
            elif kept := self._kept_by_operation(node):
                self.decided.reasons[node] = f"the recipe keeps {kept} in float"
            elif operation.kind not in _QUANTIZES_OPERANDS:
                floats = [s for s in data_operands(node) if not self._may_be_integer(s, node)]
                if floats:
                    self.decided.reasons[node] = f"its operand {floats[0].name} is float"

    def _decide_recurrent(self, node: fx.Node, started: bool, reason: str) -> str:
        """Why an operation of no integer form is float to its neighbours.

        A recurrent layer may quantize what it reads for itself.
        """
        if self.recipe.recurrent == "float" or recurrent_of(node, self.root) is None:
            return reason
        if not started:
            return f"quantization starts at {self.recipe.start_at!r}"
        if self.ask.keeps_float(node) or (weight := self.ask.weight(node)) is None:
            return "the recipe keeps it in float"
        if weight.scheme != "symmetric":
            return 'a layer with inputs of run time takes weights.scheme = "symmetric"'
        if refusal := dynamic_refusal(node, self.root):
            return refusal
        check_dynamic(self.recipe, weight)
        self.decided.weights[node] = weight
        self.dynamic.add(node.name)
        return "it reads and gives float"

    def _may_be_integer(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether an operation that only adds or moves can have integers of its operand."""
        # The integers of a constant are made when the model is compiled. Those of an input are
        # worth a quantizer where its residual stream begins with it.
        stream = source.op == "placeholder" and node in self.stream.additions
        alone = source.op == "placeholder" and self.recipe.requantization == "dyadic"
        return source.op == "get_attr" or stream or alone or self.decided.integer(source)

    def _kept_by_operation(self, node: fx.Node) -> str:
        """What the recipe's table of operations keeps in float; else the form is noted."""
        kind, operations = self.decided.kinds[node], self.ask.operations(node)
        if node in self.stream.additions and operations.residual == "float":
            return "the residual stream"
        if kind is Kind.TABLE and is_curved(node) and operations.functions == "float":
            return str(getattr(node.target, "__name__", node.target))
        form = form_of(node, kind, operations)
        if form is None:
            return ""
        if form.method == "float":
            return form.operation
        self.decided.forms[node] = form
        return ""

    def _foreign_type(self, node: fx.Node) -> str:
        """Why codes cannot stand for the values: only float32 values are what a grid means."""
        for value in (*data_operands(node), node):
            info = tensor_info(value)
            if info is not None and info.dtype != torch.float32:
                return f"{value.name} holds {str(info.dtype).removeprefix('torch.')}, not float32"
        return ""

    def _decide_layer(self, node: fx.Node) -> None:
        weight = self.ask.weight(node)
        if weight is not None:
            self.decided.weights[node] = weight
        if weight is None:
            self.decided.reasons[node] = "the recipe keeps its weights in float"
        elif self.ask.output(node) is None or self.ask.input(node) is None:
            self.decided.reasons[node] = "the recipe keeps activations in float"
        elif any(self._is_float_input(source) for source in data_operands(node)):
            self.decided.reasons[node] = "the recipe keeps the model's inputs in float"
        elif any(source.op == "get_attr" for source in data_operands(node)):
            self.decided.reasons[node] = "it reads a constant: nothing changes at run time"

    def _is_float_input(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and self.values.spec(node) is None

    def _refuse_wide(self, sites: Sequence[ValueSite]) -> bool:
        """Keep in float what exists for 8-bit codes only; whether there was anything."""
        bits = {name: site.spec.bits for site in sites for name in site.nodes}
        wide = {node for node in self.nodes if bits.get(node.name, 0) > 8}
        for node in self.nodes:
            moves = self.decided.kinds.get(node) in (Kind.MOVE, Kind.SELECT)
            if moves and any(source in wide for source in node.all_input_nodes):
                wide.add(node)
        refused = []
        for node in self.nodes:
            narrow = self.decided.kinds.get(node) is Kind.TABLE or node.target is F.interpolate
            values = {node, *data_operands(node)}
            if narrow and self.decided.integer(node) and values & wide:
                refused.append(node)
                self.decided.reasons[node] = "it takes 8-bit values only on integers alone"
        return bool(refused)

    def _check_integers_only(self) -> None:
        """Refuse a gap of floats now, before anything is calibrated or learned."""
        between = between_integers(self.ask.root.graph, self.decided.integer)
        reasons = {node.name: reason for node, reason in self.decided.reasons.items()}
        refuse_floats((node.name for node in between if node.name in reasons), reasons)

    def _follow_consumers(self) -> None:
        """What gains nothing from integers that are only made for it.

        That is movement and averages in front of float operations; and the arithmetic between an
        accumulator and a softmax, a layer norm or a residual stream that stays in float.
        """
        for node in reversed(self.nodes):
            kind = self.decided.kinds.get(node)
            if node in self.decided.reasons or any(
                self.decided.integer(user) for user in node.users
            ):
                continue
            if kind in (Kind.MOVE, Kind.POOL):
                follows = not self.recipe.quantize_output
            else:
                follows = kind in (Kind.PAIR, Kind.TABLE, Kind.SELECT) and any(
                    user in self.stream.additions
                    or self.decided.kinds.get(user) in (Kind.SOFTMAX, Kind.NORM, Kind.NORMALIZE)
                    for user in node.users
                )
            if follows:
                self.decided.reasons[node] = "its consumers are float"
