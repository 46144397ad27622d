"""What reads no input is computed once."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from passes.canonical.functional_layers import make_layer_modules
from passes.canonical.plain_values import PlainValues
from passes.canonicalize import Canonicalize
from passes.infra.base import Decline, Pass, PassResult, TensorInfo, module_path
from passes.infra.expansion import Expansion
from passes.infra.rewrite import Rewriter
from passes.infra.stored import call_sites, drop_unread, get_tensor, module_of, stored_reads
from passes.infra.walk import reached

__all__ = ["FoldConstants"]

_ALLOWED_GROWTH = 64 * 2**20
"""By how many bytes a stored result may exceed what it is computed from."""


class FoldConstants(Pass):
    """Compute what depends on stored tensors alone, and store the result as a buffer.

        before                              after
        t = table[index]                    bias = constant(bias)
        bias = t.permute(2, 0, 1)           y = scores + bias
        y = scores + bias

    Sizes and types that no batch size changes count as constants too, so that a causal mask made
    in forward is one. A layer that gets its weight this way becomes a module. The tensors of the
    model are read and never written; a result never shares their memory.

    Declines for results that need 64 MB more than what they are computed from, and for random
    values. A parameter that is read as it is stays what it is.
    """

    exact = True
    after = (Canonicalize,)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        reads = stored_reads(graph_module)
        folder = _Folder(graph_module)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            for node in graph_module.graph.nodes:
                folder.visit(node)
        results = folder.results()
        for node in results:
            value = folder.values[node].detach().clone(memory_format=torch.contiguous_format)
            path = _owner(rewriter, node)
            sources = folder.computed_from(node)
            expansion = Expansion(rewriter, node, path=path, sources=sources)
            new = expansion.constant(node.name, value)
            expansion.finish(new, keep_name=True)
        if results:
            make_layer_modules(rewriter)
        modified = rewriter.finish()
        if results:
            drop_unread(graph_module, reads)
        return PassResult(modified, tuple(folder.declines))


class _Folder:
    """Values of the nodes that are constant, computed in the order of the graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.plain = PlainValues(graph_module)
        self.interpreter = fx.Interpreter(graph_module)
        self.values: dict[fx.Node, Any] = {}
        self.stored: dict[fx.Node, frozenset[fx.Node]] = {}
        self.declines: list[Decline] = []

    def visit(self, node: fx.Node) -> None:
        """Compute `node` where everything that it reads is known."""
        if node.op == "get_attr":
            try:
                self.values[node] = get_tensor(self.graph_module, str(node.target))
            except AttributeError:
                return
            self.stored[node] = frozenset((node,))
            return
        if node.op in ("placeholder", "output") or _writes(node) or not self._is_known(node):
            return
        stored = frozenset().union(
            *(self.stored.get(source, frozenset()) for source in node.all_input_nodes)
        )
        reason = _too_large(node.meta.get("tensor"), stored) or self._compute(node)
        if reason:
            self.declines.append(Decline.at(node, reason))
        else:
            self.stored[node] = stored

    def _is_known(self, node: fx.Node) -> bool:
        if any(user for user in node.users if _writes(user)):
            return False
        module = module_of(node)
        if module is not None and module.training:
            return False
        sources = node.all_input_nodes
        if not node.meta.get("tensor") and not any(source in self.values for source in sources):
            return False  # arithmetic with sizes stays in the graph
        # What is not annotated as a tensor may be a size: asking for its value takes a run.
        rest = [source for source in sources if source not in self.values]
        if any(source.meta.get("tensor") for source in rest):
            return False
        return all(self.plain.get(source) is not None for source in rest)

    def _compute(self, node: fx.Node) -> str:
        def value(source: fx.Node) -> Any:
            return self.values[source] if source in self.values else self.plain.get(source)

        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        before = torch.get_rng_state()
        try:
            result = getattr(self.interpreter, node.op)(node.target, args, kwargs)
        except Exception as error:
            return f"computing it ahead fails: {error}"
        if not torch.equal(before, torch.get_rng_state()):
            return "it is random"
        self.values[node] = result
        return ""

    def results(self) -> list[fx.Node]:
        """The computed tensors that something reads which is not itself folded."""
        needed: set[fx.Node] = set()
        found = []
        for node in reversed(self.graph_module.graph.nodes):
            folded = node in self.values and node.op != "get_attr"
            if folded and node not in needed:
                continue
            if folded and isinstance(self.values[node], Tensor):
                found.append(node)
            else:
                needed.update(node.all_input_nodes)
        return found[::-1]

    def computed_from(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that disappear into `node`, in the order of the graph."""
        behind = reached([node], lambda n: [s for s in n.all_input_nodes if s in self.values])
        return behind[:0:-1]


def _too_large(info: Any, stored: Iterable[fx.Node]) -> str:
    limit = _ALLOWED_GROWTH + sum(_bytes(node.meta.get("tensor")) for node in stored)
    size = _bytes(info)
    if size <= limit:
        return ""
    return f"its {size / 2**20:.0f} MB would be stored, which is more than it is computed from"


def _bytes(info: Any) -> int:
    if isinstance(info, TensorInfo):
        return prod(info.shape) * info.dtype.itemsize
    return sum(_bytes(item) for item in info) if isinstance(info, tuple) else 0


def _writes(node: fx.Node) -> bool:
    """Whether the call writes into an operand, or gives memory that nobody has written."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op not in ("call_function", "call_method"):
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place
        or node.target is operator.setitem
        or name in ("iadd", "isub", "imul", "itruediv")
        or name.startswith(("empty", "new_empty"))
        or node.kwargs.get("inplace") is True
        or "out" in node.kwargs
    )


def _owner(rewriter: Rewriter, node: fx.Node) -> str:
    """The module to store the result in: that of the node, unless it is a layer."""
    path, called = module_path(node), call_sites(rewriter.graph)
    while path:
        try:
            module = rewriter.graph_module.get_submodule(path)
        except AttributeError:
            module = None
        if module is not None and path not in called:
            return path
        path = path.rpartition(".")[0]
    return ""
