"""All values of a float network, and the real values of what a target computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["real_bias", "run_both"]


def run_both(
    fused: fx.GraphModule, lowered: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float and found values by the names of the fused graph's nodes, ``output`` among them.

    `lowered` is the target's graph, or the integer graph, whose values an exact target computes
    whatever its own graph shows. A value that several nodes stand for is that of the last; one
    that no node shows has only the float side.
    """
    expected, found = _Values(fused), _Values(lowered)
    with torch.no_grad():
        for run in (expected, found):
            output = run.run(*inputs)
            if isinstance(output, Tensor):
                run.plain["output"] = run.real["output"] = output
    return expected.plain, found.real


def real_bias(integer: fx.GraphModule, path: str) -> Tensor | None:
    """What the integers of a layer's bias stand for, or None where it has none."""
    for node in integer.graph.nodes:
        if node.op == "get_attr" and node.target == f"{path}.bias":
            scale: Tensor = node.meta["channel_scale"]
            return integer.get_buffer(str(node.target)) * scale
    return None


class _Values(fx.Interpreter):
    """Runs a graph and keeps every float value, and the real value of every integer one."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.plain: dict[str, Tensor] = {}
        self.real: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # Constants are packed as their kernels want them.
        if not isinstance(result, Tensor) or n.op == "get_attr":
            return result
        grid = n.meta.get("grid")
        if grid is not None:
            codes = result.int_repr() if result.is_quantized else result
            scale = n.meta.get("channel_scale", grid.scale)
            if isinstance(scale, Tensor):
                scale = scale.view(-1, *[1] * (codes.dim() - 2))
            name = n.meta.get("simulated", n.name)
            self.real[name] = scale * (codes.float() - grid.zero_point)
        elif result.is_floating_point() and not result.is_quantized:
            self.plain[n.name] = result
        return result
