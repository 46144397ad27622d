"""The one native program that a network is, with its inputs and outputs in their order."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fxquant.backends.native.program_module import NativeProgram
from fxquant.errors import TargetError
from passes.infra.listing import operation
from passes.infra.verify import flatten

__all__ = ["whole_program"]

_PICKING = (getattr, operator.getitem)


def whole_program(lowered: fx.GraphModule, example: Sequence[Any]) -> fx.GraphModule:
    """The graph of the only program of a native graph, its outputs as one tuple.

    Raises TargetError where Python calls torch between native programs, and for inputs and
    outputs that are no tensors.
    """
    _check_tensors(example)
    nodes = list(lowered.graph.nodes)
    calls = [node for node in nodes if node.op == "call_module"]
    between = [node for node in nodes if node.meta.get("kernel") == "reference"]
    if between or len(calls) != 1:
        counted = Counter(operation(n) for n in between if n.target not in _PICKING)
        named = ", ".join(f"{count} x {what}" for what, count in sorted(counted.items()))
        raise TargetError(
            f"the network cannot be exported: native has no kernel for {named or 'it'}, and what "
            "is exported cannot call torch; look at q.stages['native'], and choose forms of these "
            "operations, or a recipe, that compute in integers"
        )
    call = calls[0]
    program = lowered.get_submodule(str(call.target))
    assert isinstance(program, NativeProgram)
    source = program.graph_module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = {
        node: graph.placeholder(node.name) for node in nodes if node.op == "placeholder"
    }
    inner = [node for node in source.graph.nodes if node.op == "placeholder"]
    copies.update(
        (mine, placeholders[theirs]) for mine, theirs in zip(inner, call.args, strict=True)
    )
    for node in source.graph.nodes:
        if node.op == "output":
            results = node.args[0]
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = []
    for path, node in flatten(nodes[-1].args[0]):
        if node in placeholders:
            outputs.append(placeholders[node])
        elif isinstance(node, fx.Node) and node.target is operator.getitem and node.args[0] is call:
            outputs.append(copies[results[node.args[1]]])
        else:
            raise TargetError(
                f"the network cannot be exported: output{path} does not depend on its inputs"
            )
    graph.output(tuple(outputs))
    return fx.GraphModule(source, graph)


def _check_tensors(example: Sequence[Any]) -> None:
    for index, value in enumerate(example):
        if not isinstance(value, Tensor):
            raise TargetError(
                f"the network cannot be exported: input {index} is a {type(value).__name__}; only "
                "tensors go in; make it a constant of the model"
            )
