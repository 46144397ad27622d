"""Runs of kernel calls without Python in between.

A call of a quantized kernel from Python spends about ten microseconds on handing over its packed
weights, as much as a small convolution takes. Torch's interpreter of traced functions does not.
The graph stays what it is: stretches of it are traced, and the rest is called as before.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.backends.x86 import kernels
from fxquant.backends.x86.traceable import traced
from passes import tensor_info
from passes.infra.verify import flatten

__all__ = ["Executor", "with_traced_stretches"]

# Shorter stretches gain less than their own call costs.
_FEWEST_CALLS = 4


class Executor:
    """Calls like the x86 graph that it is made of, and gives the same values, faster.

    Stretches of the graph are traced on `example`, and must give the graph's values for it and
    for a batch of twice its size. Where they do not, and where torch cannot trace, the graph runs
    as it is, and `notes` say why; so it does for inputs of another shape behind the batch. Copies
    and pickles hold the graph alone, and trace again.
    """

    def __init__(self, graph_module: fx.GraphModule, example: Sequence[Any]) -> None:
        self.graph_module = graph_module
        self.example = tuple(example)
        self._shapes = [_shape(value) for value in example]
        self._traced, self.notes = self._trace()

    def __call__(self, *inputs: Any) -> Any:
        """The outputs of the graph; gradients must be off."""
        if self._traced is None or [_shape(value) for value in inputs] != self._shapes:
            return self.graph_module.forward(*inputs)
        return _run(self._traced, inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {"graph_module": self.graph_module, "example": self.example}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _trace(self) -> tuple[fx.GraphModule | None, tuple[str, ...]]:
        """The graph with traced stretches, or None and why it runs as it is."""
        if not all(isinstance(value, Tensor) for value in self.example):
            return None, (_untraced("an input is not a tensor"),)
        try:
            traced = with_traced_stretches(self.graph_module, self.example)
            if traced is None:
                return None, ()
            twice = tuple(torch.cat([value, value]) for value in self.example)
            with torch.no_grad():
                same = all(
                    _same(self.graph_module.forward(*inputs), _run(traced, inputs))
                    for inputs in (self.example, twice)
                )
        except Exception as error:  # Whatever tracing cannot do, the graph can.
            first = (str(error).strip().splitlines() or ["no message"])[0]
            return None, (_untraced(f"{type(error).__name__}: {first}"),)
        if not same:
            return None, (_untraced("what torch traced gives other values than the graph"),)
        return traced, ()


def _untraced(cause: str) -> str:
    return f"x86: the kernels are called one by one from Python, which is slower: {cause}"


def with_traced_stretches(
    graph_module: fx.GraphModule, example: Sequence[Any]
) -> fx.GraphModule | None:
    """The same graph with calls of traced functions in it; None where there is no stretch.

    Modules and constants are shared. `example` is only run on.
    """
    stretches = _stretches(graph_module)
    if not stretches:
        return None
    of = {node: stretch for stretch in stretches for node in stretch}
    inputs = {n for node in of for n in node.all_input_nodes if n.op != "get_attr"}
    values = _Recorder(graph_module, inputs)
    with torch.no_grad():
        values.run(*example)
    root, graph = nn.Module(), fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node in of:
            if node is of[node][-1]:
                _call_traced(graph_module, of[node], values.values, root, graph, new)
            continue
        new[node] = graph.node_copy(node, new.__getitem__)
        if node.op == "get_attr":
            setattr(root, str(node.target), getattr(graph_module, str(node.target)))
        elif node.op == "call_module":
            root.add_module(str(node.target), graph_module.get_submodule(str(node.target)))
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return fx.GraphModule(root, graph, "TracedGraph")


def _stretches(graph_module: fx.GraphModule) -> list[list[fx.Node]]:
    """Maximal runs of traceable calls, constants between them left aside."""
    found: list[list[fx.Node]] = [[]]
    for node in graph_module.graph.nodes:
        if _is_traceable(node):
            found[-1].append(node)
        elif node.op not in ("get_attr", "placeholder"):
            found.append([])
    return [stretch for stretch in found if len(stretch) >= _FEWEST_CALLS]


def _is_traceable(node: fx.Node) -> bool:
    if tensor_info(node) is None:
        return False
    if any(n.op != "get_attr" and tensor_info(n) is None for n in node.all_input_nodes):
        return False
    return traced(node) is not None


def _call_traced(
    graph_module: fx.GraphModule,
    stretch: list[fx.Node],
    values: dict[fx.Node, Any],
    root: nn.Module,
    graph: fx.Graph,
    new: dict[fx.Node, fx.Node],
) -> None:
    """One call instead of `stretch`, and in `new` what stands for its results."""
    inside = set(stretch)

    def is_input(node: fx.Node) -> bool:
        return node not in inside and (node.op != "get_attr" or _is_opaque(graph_module, node))

    inputs = dict.fromkeys(n for node in stretch for n in node.all_input_nodes if is_input(n))
    outputs = [node for node in stretch if not inside.issuperset(node.users)]
    part, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
    for node in stretch:
        for constant in node.all_input_nodes:
            if constant.op == "get_attr" and constant not in copies:
                copies[constant] = part.node_copy(constant)
        copies[node] = part.node_copy(node, copies.__getitem__)
        copies[node].target = traced(node)
    part.output(tuple(copies[node] for node in outputs))
    path = f"stretch_{len(root._modules)}"
    module = fx.GraphModule(graph_module, part)
    example = tuple(
        getattr(graph_module, str(node.target)) if node.op == "get_attr" else values[node]
        for node in inputs
    )
    root.add_module(path, _trace(module, example))
    call = graph.call_module(path, tuple(new[node] for node in inputs))
    for index, node in enumerate(outputs):
        new[node] = graph.call_function(operator.getitem, (call, index))


def _is_opaque(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a constant is a tensor of oneDNN's own layout, which no trace can hold."""
    value = getattr(graph_module, str(node.target))
    return isinstance(value, Tensor) and value.is_mkldnn


def _trace(module: fx.GraphModule, example: tuple[Any, ...]) -> Any:
    with torch.no_grad(), kernels.onednn, warnings.catch_warnings():
        # Tracing is on its way out of torch, like the quantized tensors that it is needed for.
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace
        return trace(module.eval(), example, check_trace=False)


def _run(traced: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    # Unoptimized: the interpreter is all that is wanted here, and an optimizer that merges equal
    # calls does not know that `conv2d_add` writes over its residual.
    with kernels.onednn, _optimized(False):
        return traced.forward(*inputs)


_optimized: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]


class _Recorder(fx.Interpreter):
    """Keeps copies of the values of `wanted` nodes: a kernel may write over them later."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.wanted = wanted
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.values[n] = result.clone() if isinstance(result, Tensor) else result
        return result


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) and value.dim() else None


def _same(expected: Any, found: Any) -> bool:
    pairs = zip(flatten(expected), flatten(found), strict=True)
    return all(
        torch.equal(want, got) if isinstance(want, Tensor) else want == got
        for (_, want), (_, got) in pairs
    )
