"""Pairs of linear layers with nothing but elementwise functions in between."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from fxquant.plan.operations import Kind, classify, layer_of
from passes import tensor_info
from passes.layers.questions import activation_of

__all__ = ["ACTIVATIONS_BEHIND", "SPLIT", "HiddenPair", "find_pairs"]

SPLIT = "split_outliers"
"""In the meta of the layers that a split made: they are not split again."""

ACTIVATIONS_BEHIND = ("none", "relu")
"""What may be fused behind the second layer."""


@dataclass(frozen=True, eq=False)
class HiddenPair:
    """Two linear layers and the elementwise functions between them; `path` is the second's."""

    first: fx.Node
    functions: tuple[fx.Node, ...]
    second: fx.Node
    path: str


def find_pairs(fused: fx.GraphModule) -> list[HiddenPair]:
    """The pairs of an annotated fused graph whose hidden value nobody else reads."""
    calls = Counter(node.target for node in fused.graph.nodes if node.op == "call_module")

    def is_linear(node: fx.Node) -> bool:
        # A layer that also reads a residual has two inputs.
        return (
            isinstance(layer_of(node, fused), nn.Linear)
            and calls[node.target] == 1
            and len(node.args) == len(node.all_input_nodes) == 1
            and SPLIT not in node.meta
        )

    found = []
    for first in fused.graph.nodes:
        if not is_linear(first) or len(first.users) != 1:
            continue
        functions: list[fx.Node] = []
        (node,) = first.users
        while classify(node, fused).kind is Kind.TABLE and len(node.users) == 1:
            functions.append(node)
            (node,) = node.users
        values = (first, *functions, node)
        annotated = all(tensor_info(value) is not None for value in values)
        if is_linear(node) and annotated and activation_of(node) in ACTIVATIONS_BEHIND:
            found.append(HiddenPair(first, tuple(functions), node, str(node.target)))
    return found
