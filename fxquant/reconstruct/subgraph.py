"""Parts of a graph as graphs of their own, and the order in which they are worked through."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import CompileError
from fxquant.plan.macs import multiply_accumulates
from fxquant.plan.operations import layer_of
from passes import FusedLayer, is_depthwise, tensor_info
from passes.infra.meta import copy_meta
from passes.infra.walk import reached

__all__ = [
    "BlockStep",
    "Subgraph",
    "cut",
    "has_depthwise",
    "macs_of",
    "network_output",
    "order_steps",
    "trainable_layers",
    "work_bytes",
]

# What training holds for each value of a node: itself, before its activation, as codes, the slope
# for the step, gradients, and the kernels' own layouts of them. ResNet-18's first block takes 3.9,
# MobileNetV2's second one 6.4.
_COPIES = 7


@dataclass(frozen=True)
class Subgraph:
    """A piece of a graph that computes one value from others: `module(*inputs)`."""

    module: fx.GraphModule
    inputs: tuple[str, ...]


def cut(root: fx.GraphModule, output: str, boundary: Collection[str]) -> Subgraph:
    """What computes the value of node `output` from the values of `boundary`.

    The modules are shared with `root`. Nodes between, such as quantizers, come along; constants
    and inputs of the graph do too. A size is that of the tensors at hand: the batch is counted
    on the first input, everything else is as the graph was annotated.

    Raises:
        CompileError: the value depends on no tensor of `boundary` and no input.
    """
    nodes = {node.name: node for node in root.graph.nodes}

    def is_input(node: fx.Node) -> bool:
        return node.op == "placeholder" or (node.name in boundary and node.name != output)

    def reads(node: fx.Node) -> list[fx.Node]:
        return [] if is_input(node) or _is_size(node) else node.all_input_nodes

    needed = set(reached([nodes[output]], reads))
    placeholders = [node for node in root.graph.nodes if node in needed and is_input(node)]
    inside = needed - set(placeholders)
    if not placeholders:
        raise CompileError(f"{output} depends on no input: there is nothing to reconstruct")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in placeholders:
        copies[node] = graph.placeholder(node.name)
        copy_meta(node, copies[node], "place", "shape")
    first = placeholders[0]
    for node in root.graph.nodes:
        if node not in inside:
            continue
        if _is_size(node):
            copies[node] = graph.call_function(_size, _size_arguments(node, first, copies[first]))
        else:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[nodes[output]])
    return Subgraph(fx.GraphModule(root, graph), tuple(node.name for node in placeholders))


def network_output(root: fx.GraphModule) -> str | None:
    """The name of the node that the graph returns, or None where it returns more than a tensor."""
    output = next(node for node in root.graph.nodes if node.op == "output")
    value = output.args[0]
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    return value.name if isinstance(value, fx.Node) and tensor_info(value) is not None else None


@dataclass(frozen=True)
class BlockStep:
    """One value to compute of every image; `block` names what is reconstructed to make it."""

    output: str
    inputs: tuple[str, ...]
    block: str | None = None


def order_steps(
    fused: fx.GraphModule, blocks: Sequence[Any], trained: Collection[str], *, end: bool
) -> list[BlockStep]:
    """The values to cache, in execution order: what blocks read, and what they make.

    `blocks` have a name, inputs and an output; those named in `trained` are reconstructed, the
    others are passed through where a later one needs them. With `end` the network's output is
    the last step.
    """
    position = {node.name: index for index, node in enumerate(fused.graph.nodes)}
    nodes = {node.name: node for node in fused.graph.nodes}
    made = {block.output: block.name for block in blocks if block.name in trained}
    wanted = set(made)
    for block in blocks:
        wanted |= {name for name in block.inputs if _is_cached(nodes[name])}
        wanted.add(block.output)
    if end and (last := network_output(fused)) is not None:
        wanted.add(last)
    else:
        last = None
    inputs = {
        name: cut(fused, name, wanted).inputs
        for name in wanted
        if nodes[name].op != "placeholder" and _depends_on_input(nodes[name])
    }
    needed: set[str] = set()
    steps = []
    for name in sorted(inputs, key=lambda name: position[name], reverse=True):
        if name in made or name in needed or name == last:
            needed |= set(inputs[name])
            steps.append(BlockStep(name, inputs[name], made.get(name)))
    return steps[::-1]


def macs_of(graph: fx.GraphModule) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image."""
    layers = (node for node in graph.graph.nodes if layer_of(node, graph) is not None)
    return sum(multiply_accumulates(node, graph) for node in layers)


def has_depthwise(graph: fx.GraphModule) -> bool:
    """Whether it has depthwise convolutions, as MobileNets do."""
    return any(is_depthwise(module) for module in graph.modules())


def work_bytes(graph: fx.GraphModule) -> float:
    """About how many bytes training a part takes for each image, weights left out."""
    total, images = 0.0, 1
    for node in graph.graph.nodes:
        info = tensor_info(node)
        if info is None or node.op in ("get_attr", "output"):
            continue
        if node.op == "placeholder" and info.shape:
            images = max(1, info.shape[0])
        total += math.prod(info.shape) * info.dtype.itemsize
    return _COPIES * total / images


def trainable_layers(module: fx.GraphModule) -> dict[str, FusedLayer]:
    """The layers of a part by path whose weights pass through a quantizer."""
    return {
        str(node.target): layer
        for node in module.graph.nodes
        if node.op == "call_module"
        and isinstance(layer := module.get_submodule(str(node.target)), FusedLayer)
        and layer.weight_quantizer is not None
    }


def _is_cached(node: fx.Node) -> bool:
    return node.op not in ("get_attr", "output") and tensor_info(node) is not None


def _depends_on_input(node: fx.Node) -> bool:
    behind = reached([node], lambda current: current.all_input_nodes)
    return any(current.op == "placeholder" for current in behind)


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def _size_arguments(node: fx.Node, first: fx.Node, copy: fx.Node) -> tuple[Any, ...]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    info, start = tensor_info(source), tensor_info(first)
    if info is None or start is None:
        raise CompileError(f"{node.name}: the size of an unannotated value cannot be told")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return copy, start.shape[0], tuple(info.shape), dim


def _size(first: Tensor, rows: int, shape: tuple[int, ...], dim: int | None) -> Any:
    """The size of a tensor annotated as `shape`, where `first` was annotated with `rows` rows."""
    size = torch.Size((shape[0] * first.shape[0] // rows, *shape[1:])) if shape else torch.Size(())
    return size if dim is None else size[dim]
