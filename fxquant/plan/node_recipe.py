"""What a recipe says of a node: selectors see its path, its type and its position."""

from __future__ import annotations

from torch import fx, nn

from fxquant.frontend.prepare import FloatLeaf
from fxquant.plan.operations import layer_of
from fxquant.recipe import OperationRecipe, Recipe
from fxquant.spec import QuantSpec
from passes import module_path

__all__ = ["NodeRecipe"]


class NodeRecipe:
    """The recipe of one fused graph."""

    def __init__(self, root: fx.GraphModule, recipe: Recipe) -> None:
        self.root = root
        self.recipe = recipe
        layers = [node for node in root.graph.nodes if layer_of(node, root) is not None]
        self.first_layer = layers[0] if layers else None
        self.last_layer = layers[-1] if layers else None

    def keeps_float(self, node: fx.Node) -> bool:
        """Whether one of the selectors of `Recipe.float` picks it."""
        return self.recipe.keeps_float(*self._where(node))

    def operations(self, node: fx.Node) -> OperationRecipe:
        """The forms of the operations."""
        return self.recipe.operations_for(*self._where(node))

    def weight(self, node: fx.Node) -> QuantSpec | None:
        """Of a layer's weight; None: it stays float."""
        return self.recipe.spec_for_weight(*self._where(node))

    def output(self, node: fx.Node) -> QuantSpec | None:
        """Of what it makes; None: it stays float."""
        return self.recipe.spec_for_output(*self._where(node))

    def input(self, node: fx.Node) -> QuantSpec | None:
        """Of what it reads; None: it stays float."""
        return self.recipe.spec_for_input(*self._where(node))

    def explicit_input(self, node: fx.Node) -> QuantSpec | None:
        """Of what it reads, where an override says so."""
        return self.recipe.input_override(*self._where(node))

    def sets_output(self, node: fx.Node) -> bool:
        """Whether an override says what it makes."""
        return self.recipe.overrides_output(*self._where(node))

    def _where(self, node: fx.Node) -> tuple[str, str, str]:
        return module_path(node), self._type_name(node), self._position(node)

    def _type_name(self, node: fx.Node) -> str:
        layer = layer_of(node, self.root)
        if layer is not None:
            return type(layer).__name__
        if node.op == "call_module":
            return _kind(self.root.get_submodule(str(node.target)))
        return str(getattr(node.target, "__name__", node.target))

    def _position(self, node: fx.Node) -> str:
        if node is self.first_layer:
            return "first"
        return "last" if node is self.last_layer else ""


def selectable(graph: fx.GraphModule) -> tuple[list[str], dict[str, str]]:
    """What selectors may name: the modules of the model, with the types of those called."""
    types = {
        str(node.target): _kind(graph.get_submodule(str(node.target)))
        for node in graph.graph.nodes
        if node.op == "call_module"
    }
    paths = {node.meta.get("module_path") or "" for node in graph.graph.nodes} | set(types)
    parents = {
        ".".join(path.split(".")[:depth]) for path in paths for depth in range(path.count(".") + 1)
    }
    return sorted((paths | parents) - {""}), types


def _kind(module: nn.Module) -> str:
    return type(module.module if isinstance(module, FloatLeaf) else module).__name__
