"""Which layers read which channel of a layer norm, and through which column of their weights.

Channels are followed by sending their numbers along the graph in place of the values: data
movement that keeps every column to one channel is proved by that and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.plan.operations import Kind, classify, layer_of
from passes import tensor_info

__all__ = ["ChannelWalk", "twice_the_batch"]

_MOVES = (
    torch.flatten, torch.unflatten, torch.permute, torch.transpose, torch.unsqueeze, torch.squeeze,
    torch.chunk, torch.split, torch.unbind, torch.select, torch.narrow, torch.roll, torch.flip,
    operator.getitem,
)  # fmt: skip
_POOLS = {
    F.adaptive_avg_pool1d: F.adaptive_max_pool1d,
    F.adaptive_avg_pool2d: F.adaptive_max_pool2d,
    F.adaptive_avg_pool3d: F.adaptive_max_pool3d,
}
_PADDING = -1.0  # stands where a zero of F.pad stands


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps every tensor's shape and every number."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.numbers: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        elif isinstance(result, (int, float, torch.Size)):
            self.numbers[n] = result
        return result


def twice_the_batch(
    fused: fx.GraphModule,
) -> tuple[Mapping[fx.Node, tuple[int, ...]], Mapping[fx.Node, Any]]:
    """Shapes and numbers with twice the probe's batch.

    Among the probe's dimensions of size 1 a reshape could mix channels without anyone seeing it.
    """
    interpreter = _Shapes(fused)
    infos = [tensor_info(node) for node in fused.graph.nodes if node.op == "placeholder"]
    try:
        inputs = [
            torch.zeros(2 * info.shape[0], *info.shape[1:], dtype=info.dtype)
            for info in infos
            if info is not None
        ]
        with torch.no_grad():
            interpreter.run(*inputs)
    except Exception:
        # A model that takes no other batch has the shapes that it was annotated with.
        annotated = {node: tensor_info(node) for node in fused.graph.nodes}
        return {node: info.shape for node, info in annotated.items() if info is not None}, {}
    return interpreter.shapes, interpreter.numbers


class ChannelWalk:
    """Follows the channels of one layer norm to whoever reads them.

    Args:
        fused: the graph.
        shapes, numbers: of its nodes, from `twice_the_batch`.
        calls: how often each module is called.

    Attributes:
        readers: for each linear layer that reads the value, the channel that each column of its
            weight reads, int64 [in_features]; -1 where it only reads zeros of a padding.
        blocked: why it cannot be scaled, for each of those that stand in the way.
        padded: whether any column also reads zeros of a padding.
    """

    def __init__(
        self,
        fused: fx.GraphModule,
        shapes: Mapping[fx.Node, tuple[int, ...]],
        numbers: Mapping[fx.Node, Any],
        calls: Mapping[Any, int],
    ) -> None:
        self.fused, self.shapes, self.numbers, self.calls = fused, shapes, numbers, calls
        self.producer = ""
        self.channels = 0
        self.readers: dict[str, Tensor] = {}
        self.blocked: list[str] = []
        self.padded = False

    def from_norm(self, node: fx.Node) -> str:
        """Follow a layer norm; returns why it cannot migrate, or ""."""
        self._start(node)
        if self.blocked:
            return self.blocked[0]
        return "" if self.readers else "nothing reads it"

    def _start(self, node: fx.Node) -> None:
        self.producer = str(node.target)
        self.channels = self.shapes[node][-1]
        numbers = torch.arange(self.channels, dtype=torch.float32)
        pending: list[tuple[fx.Node, Any]] = [
            (node, numbers.expand(self.shapes[node]).contiguous())
        ]
        while pending:
            source, ids = pending.pop()
            for user in source.users:
                moved = self._step(source, user, ids)
                if moved is not None:
                    pending.append((user, moved))

    def _step(self, source: fx.Node, user: fx.Node, ids: Any) -> Any:
        """What `user` makes of the channels; None where the way ends."""
        if user.op == "output":
            self._block("it is an output of the graph")
        elif layer_of(user, self.fused) is not None:
            self._read(source, user, ids)
        elif classify(user, self.fused).kind is not Kind.SHAPE:
            moved = self._moved(source, user, ids)
            if moved is not None:
                return moved
            name = getattr(user.target, "__name__", user.target)
            self._block(f"{name} reads it ({user.name})")
        return None

    def _block(self, reason: str) -> None:
        self.blocked.append(reason)

    def _read(self, source: fx.Node, user: fx.Node, ids: Any) -> None:
        path = str(user.target)
        layer = layer_of(user, self.fused)
        if not isinstance(layer, nn.Linear):
            self._block(f"{path} is a {type(layer).__name__}, not a linear layer")
        elif user.args[0] is not source or source in user.args[1:]:
            self._block(f"{path} adds it to its result")
        elif self.calls[path] > 1:
            self._block(f"{path} is called more than once")
        else:
            rows = ids.reshape(-1, layer.in_features)
            columns = rows.amax(0)
            if bool(((rows != columns) & (rows != _PADDING)).any()):
                self._block(f"a column of {path} reads more than one channel")
                return
            self.padded = self.padded or bool((rows == _PADDING).any())
            self.readers[path] = columns.long()

    def _moved(self, source: fx.Node, user: fx.Node, ids: Any) -> Any:
        """The channels behind data movement or an average over positions; None for the rest."""
        if user.op != "call_function" or user.args[:1] != (source,):
            return None
        if user.target is torch.reshape:
            return ids.reshape(self.shapes[user])
        kwargs: dict[str, Any]
        try:
            args = fx.map_arg(user.args[1:], lambda node: self.numbers[node])
            kwargs = fx.map_arg(user.kwargs, lambda node: self.numbers[node])
        except KeyError:
            return None
        if user.target in _MOVES:
            target: Any = user.target
            return target(ids, *args, **kwargs)
        if user.target is F.pad and (kwargs["mode"], kwargs["value"]) == ("constant", 0):
            return F.pad(ids, kwargs["pad"], value=_PADDING)
        if user.target is torch.mean and kwargs["dim"] is not None:
            low, high = (f(ids, kwargs["dim"], kwargs["keepdim"]) for f in (torch.amin, torch.amax))
            return high if torch.equal(low, high) else None
        if user.target in _POOLS:
            largest: Any = _POOLS[user.target]
            high = largest(ids, kwargs["output_size"])
            return high if torch.equal(high, -largest(-ids, kwargs["output_size"])) else None
        return None
