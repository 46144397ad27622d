"""The numbers of a graph (sizes, types, what is computed from them) that no batch changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.infra.base import tensor_info

__all__ = ["PlainValues"]


class PlainValues:
    """Values that are no tensors and are the same for every batch size, by their nodes.

    The graph is run on fake tensors, which have a shape and no contents, with the batch size of
    the probe and with another. Where a layer takes its batch in dim 1 (``batch_first=False``),
    that varies as well. All other sizes count as fixed. Nothing is known in a graph whose inputs
    are not annotated, or that does not run in this way. The work is done on the first question.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self._values: dict[fx.Node, Any] | None = None

    def get(self, node: fx.Node) -> Any:
        """The value of `node`, or None where it is a tensor, varies or is not known."""
        if self._values is None:
            self._values = self._compute()
        return self._values.get(node)

    def _compute(self) -> dict[fx.Node, Any]:
        if any(node.op == "placeholder" and tensor_info(node) is None for node in self._nodes()):
            return {}
        dims = {0}
        for module in self.graph_module.modules():
            if getattr(module, "batch_first", True) is False:
                dims.add(1)
        try:
            first, second = (self._run(dims, factor) for factor in (1, 2))
        except Exception:
            # A graph may read the contents of a tensor, or hold for one batch size only.
            return {}
        return {node: value for node, value in first.items() if second.get(node) == value}

    def _run(self, dims: set[int], factor: int) -> dict[fx.Node, Any]:
        recorder = _Recorder(self.graph_module)
        recorder.extra_traceback = False
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            inputs = []
            for node in self._nodes():
                info = tensor_info(node)
                if node.op == "placeholder" and info is not None:
                    # Doubling alone would keep what is a multiple of the batch size.
                    shape = [
                        size * factor + factor - 1 if dim in dims else size
                        for dim, size in enumerate(info.shape)
                    ]
                    inputs.append(torch.empty(shape, dtype=info.dtype))
            recorder.run(*inputs)
        return recorder.values

    def _nodes(self) -> list[fx.Node]:
        return list(self.graph_module.graph.nodes)


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if _is_plain(result) and n.op != "output":
            self.values[n] = result
        return result


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return not isinstance(value, Tensor) and isinstance(
        value, (bool, int, float, str, torch.dtype, torch.device)
    )
