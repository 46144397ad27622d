"""How long each node of a target's graph takes, called one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.compiled import CompiledModel
from fxquant.errors import InputError
from fxquant.measure.profile import profile

__all__ = ["node_times"]


def node_times(q: CompiledModel, x: Tensor | Sequence[Any], *, calls: int = 5) -> dict[str, float]:
    """Median milliseconds of one call by node of the fused graph, in the order of execution.

    Native programs measure themselves (`profile`). The graphs of other targets are interpreted
    node by node, so that each carries the cost of a call from Python.

    Raises:
        InputError: inputs that do not fit, or less than one call.
    """
    if calls < 1:
        raise InputError(f"calls is {calls}; expected at least 1")
    if q.target == "native":
        integer = {node.name: node for node in q.stages["integer"].graph.nodes}
        times: dict[str, float] = {}
        for layer in profile(q, x, calls=calls).layers:
            name = _name(integer[layer.node]) if layer.node in integer else layer.node
            times[name] = times.get(name, 0.0) + layer.nanoseconds / 1e6
        return times
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    q(*inputs)
    clock = _Clock(q.stages[q.target])
    with torch.no_grad():
        clock.run(*inputs)
        clock.nanoseconds.clear()
        for _ in range(calls):
            clock.run(*inputs)
    return {name: statistics.median(found) / 1e6 for name, found in clock.grouped(calls).items()}


def _name(node: fx.Node) -> str:
    return str(node.meta.get("simulated", node.name))


class _Clock(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.nanoseconds: dict[fx.Node, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        begin = time.perf_counter_ns()
        result = super().run_node(n)
        spent = time.perf_counter_ns() - begin
        if n.op not in ("placeholder", "get_attr", "output"):
            self.nanoseconds.setdefault(n, []).append(spent)
        return result

    def grouped(self, calls: int) -> dict[str, list[int]]:
        """The nanoseconds of every call, of all nodes that stand for one of the fused graph."""
        sums: dict[str, list[int]] = {}
        for node, found in self.nanoseconds.items():
            total = sums.setdefault(_name(node), [0] * calls)
            for index, spent in enumerate(found):
                total[index] += spent
        return sums
