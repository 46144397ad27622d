"""The numbers of a graph (sizes, types, what is computed from them) that no batch changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.infra.base import TensorInfo, tensor_info

__all__ = ["PlainValues"]


class PlainValues:
    """Values that are no tensors and are the same for every batch size, by their nodes.

    The graph is run on fake tensors, which have a shape and no contents, with the batch size of
    the probe and with another. Where a layer takes its batch in dim 1 (``batch_first=False``),
    that varies as well. All other sizes count as fixed. Nothing is known in a graph whose inputs
    are not annotated, nor behind a node that does not run in this way. The graph is taken as it is
    at the first question, and runs as far as the questions go, no further.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self._values: dict[fx.Node, Any] = {}
        self._steps: Iterator[fx.Node] | None = None
        self._seen: set[fx.Node] = set()

    def get(self, node: fx.Node) -> Any:
        """The value of `node`, or None where it is a tensor, varies or is not known."""
        if self._steps is None:
            self._steps = self._run()
        while node not in self._seen and (done := next(self._steps, None)) is not None:
            self._seen.add(done)
        return self._values.get(node)

    def _run(self) -> Iterator[fx.Node]:
        """Run the graph with both batch sizes, and give each node that has run."""
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        infos = [tensor_info(node) for node in placeholders]
        known = [info for info in infos if info is not None]
        if len(known) < len(infos):
            return
        dims = {0}
        for module in self.graph_module.modules():
            if getattr(module, "batch_first", True) is False:
                dims.add(1)
        copies: dict[fx.Node, fx.Node] = {}
        snapshot = fx.Graph()
        snapshot.graph_copy(self.graph_module.graph, copies)
        runs = [_Run(self.graph_module, snapshot, known, dims, factor) for factor in (1, 2)]
        for node, twin in copies.items():
            try:
                first, second = (run.step(twin) for run in runs)
            except Exception:
                # A graph may read the contents of a tensor, or hold for one batch size only.
                return
            if _is_plain(first) and _is_plain(second) and first == second:
                self._values[node] = first
            yield node


class _Run(fx.Interpreter):
    """One run of a graph on fake tensors, node by node."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        graph: fx.Graph,
        inputs: Sequence[TensorInfo],
        dims: set[int],
        factor: int,
    ) -> None:
        super().__init__(graph_module, graph=graph)
        self.extra_traceback = False
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        values = []
        for info in inputs:
            # Doubling alone would keep what is a multiple of the batch size.
            shape = [
                size * factor + factor - 1 if dim in dims else size
                for dim, size in enumerate(info.shape)
            ]
            with self._mode:
                values.append(torch.empty(shape, dtype=info.dtype))
        self.args_iter = iter(values)

    def step(self, node: fx.Node) -> Any:
        """Run the next node of the graph."""
        with torch.no_grad(), self._mode:
            self.env[node] = self.run_node(node)
        return self.env[node]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return not isinstance(value, Tensor) and isinstance(
        value, (bool, int, float, str, torch.dtype, torch.device)
    )
