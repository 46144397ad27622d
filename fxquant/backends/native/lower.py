"""Integer graph → a graph whose stretches are native programs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.backends.native.lowerings import APPROXIMATED, LOWERINGS, torch_has_the_bits
from fxquant.backends.native.planner import UnsupportedError
from fxquant.backends.native.program_module import NativeProgram
from fxquant.backends.native.segments import segment_module, split
from fxquant.backends.native.steps import has_number
from fxquant.to_integer.functional import pair
from passes import tensor_info
from passes.infra.listing import operation

__all__ = ["lower_to_native"]


def lower_to_native(
    integer: fx.GraphModule,
    example: Sequence[Any],
    keep: frozenset[str],
    *,
    without_torch: bool = False,
) -> tuple[fx.GraphModule, list[str]]:
    """The lowered graph, and the operation of each node that stays a call from Python.

    A node that stands for an integer one has its name in ``meta["integer"]``. Float operations of
    which torch alone has the reference's bits are left to it, unless it goes `without_torch`.
    """
    integer = _without_pairs(integer)
    unsupported = {*keep, *(node.name for node in integer.graph.nodes if _has_other_types(node))}
    if not without_torch:
        unsupported |= {node.name for node in integer.graph.nodes if torch_has_the_bits(node)}
    while True:
        try:
            return _lower(integer, example, unsupported), _calls(integer, unsupported)
        except UnsupportedError as reason:
            # The next attempt leaves this node to Python; every attempt leaves one more.
            unsupported.add(reason.node.name)


def _has_other_types(node: fx.Node) -> bool:
    """Whether a node reads or yields what programs have no type for, such as bfloat16."""
    found = (tensor_info(value) for value in (node, *node.all_input_nodes))
    return any(info is not None and not has_number(info.dtype) for info in found)


def _without_pairs(integer: fx.GraphModule) -> fx.GraphModule:
    """The graph with the parts of a pair where an item of it is read, and with tuples for others.

    What recurrent layers give is put together from tensors, and taken apart again.
    """
    if not any(node.target is pair for node in integer.graph.nodes):
        return integer
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in integer.graph.nodes:
        args: Any = fx.map_arg(node.args, values.__getitem__)
        if node.target is pair:
            values[node] = args
        elif node.target is operator.getitem and isinstance(args[0], tuple):
            values[node] = args[0][args[1]]
        elif node.op == "output":
            graph.output(args[0])
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    return fx.GraphModule(integer, graph)


def _is_native(node: fx.Node, unsupported: set[str]) -> bool:
    return node.name not in unsupported and node.target in LOWERINGS


def _calls(integer: fx.GraphModule, unsupported: set[str]) -> list[str]:
    return [
        operation(node)
        for segment in split(integer.graph, lambda n: _is_native(n, unsupported))
        if not segment.native
        for node in segment.nodes
        if node.target is not operator.getitem
    ]


def _lower(
    integer: fx.GraphModule, example: Sequence[Any], unsupported: set[str]
) -> fx.GraphModule:
    segments = split(integer.graph, lambda node: _is_native(node, unsupported))
    root, graph = nn.Module(), fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        """Constants and shapes are copied where they are first read."""
        if node not in new:
            new[node] = graph.node_copy(node, copy)
            if node.op == "get_attr":
                _share(integer, root, str(node.target))
        return new[node]

    for node in integer.graph.nodes:
        if node.op == "placeholder":
            new[node] = graph.node_copy(node)
    programs = 0
    values = _values(integer, example) if any(s.native for s in segments[1:]) else {}
    for segment in segments:
        if not segment.native:
            for node in segment.nodes:
                copied = copy(node)
                copied.meta["integer"] = node.name
                copied.meta["kernel"] = "reference"
            continue
        module, inputs, outputs = segment_module(integer, segment)
        program = NativeProgram(module)
        samples = [values[n] if n in values else _input(integer, n, example) for n in inputs]
        program.prepare(samples)
        root.add_module(f"native_{programs}", program)
        call = graph.call_module(f"native_{programs}", tuple(copy(n) for n in inputs))
        programs += 1
        for index, node in enumerate(outputs):
            new[node] = graph.call_function(operator.getitem, (call, index))
            new[node].meta = dict(node.meta)
            new[node].meta["integer"] = node.name
    output = next(iter(reversed(integer.graph.nodes)))
    graph.output(fx.map_arg(output.args[0], copy))
    lowered = fx.GraphModule(root, graph, "NativeGraph")
    lowered.meta["approximated"] = sum(
        node.target in APPROXIMATED
        for segment in segments
        if segment.native
        for node in segment.nodes
    )
    return lowered


def _share(integer: fx.GraphModule, root: nn.Module, path: str) -> None:
    """Put a constant of the integer graph at the same path below `root`."""
    source: Any = integer
    *parents, name = path.split(".")
    for parent in parents:
        source = getattr(source, parent)
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    value = getattr(source, name)
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)


def _input(integer: fx.GraphModule, node: fx.Node, example: Sequence[Any]) -> Any:
    placeholders = [n for n in integer.graph.nodes if n.op == "placeholder"]
    return example[placeholders.index(node)]


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # Only shapes and types are wanted.
        self.values[n] = result.to("meta") if isinstance(result, Tensor) else result
        return result


def _values(integer: fx.GraphModule, example: Sequence[Any]) -> dict[fx.Node, Any]:
    recorder = _Recorder(integer)
    with torch.no_grad():
        recorder.run(*example)
    return recorder.values
