"""One call site for each module."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

from torch import fx, nn

from passes.infra.base import Pass, PassResult
from passes.infra.rewrite import Rewriter
from passes.infra.stored import free_path

__all__ = ["SplitSharedModules"]


class SplitSharedModules(Pass):
    """Give every call of a module with weights a module of its own; the tensors stay shared.

        before              after
        a = conv(x)         a = conv(x)
        b = conv(a)         b = conv_1(a)

    Each place has its own range of values, so that each needs its own quantizer, and a batch norm
    may be folded at one place and not at the other. The first call keeps the path `conv`; the
    others get `conv_1`, `conv_2`, … , leaving out paths that are taken.
    """

    exact = True

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        for node in rewriter.graph.nodes:
            if node.op == "call_module":
                calls[graph_module.get_submodule(str(node.target))].append(node)
        notes = []
        for module, nodes in calls.items():
            if len(nodes) == 1 or not _has_tensors(module):
                continue
            path = str(nodes[0].target)
            for node in nodes[1:]:
                free = free_path(graph_module, path, suffixed=True)
                _move(rewriter, node, free, _copy_sharing(module))
            notes.append(f"{path} is called {len(nodes)} times: a copy for each call")
        return PassResult(rewriter.finish(), notes=tuple(notes))


def _move(rewriter: Rewriter, node: fx.Node, path: str, module: nn.Module) -> None:
    rewriter.set_module(path, module)
    node.target = path
    node.meta["module_path"] = path


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), next(module.buffers(), None)) is not None


def _copy_sharing(module: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, shared)
