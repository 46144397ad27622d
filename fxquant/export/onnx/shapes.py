"""The shapes of an integer graph with a batch of any size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.errors import TargetError

__all__ = [
    "BATCH",
    "Shape",
    "Shapes",
    "find_shapes",
    "has_tensors",
    "leaves",
    "without_plain_values",
]

BATCH = "batch"
_BATCHES = (2, 3)


@dataclass(frozen=True)
class Shape:
    """The sizes of a tensor for one sample, and which of them grow with the batch."""

    sizes: tuple[int, ...]
    batched: tuple[bool, ...]
    dtype: torch.dtype

    @property
    def names(self) -> list[int | str]:
        """As ONNX writes it: numbers, and symbols for what grows with the batch."""
        pairs = zip(self.sizes, self.batched, strict=True)
        return [
            (BATCH if size == 1 else f"{size}*{BATCH}") if grows else size for size, grows in pairs
        ]

    @property
    def fixed(self) -> list[int]:
        """As a Reshape takes it: -1 for what grows with the batch."""
        return [-1 if grows else size for size, grows in zip(self.sizes, self.batched, strict=True)]


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@dataclass(frozen=True, eq=False)
class Shapes:
    """`symbolic`: the batch is free. `values`: what each node is, by name; `Shape` for a tensor.

    Several tensors are a tuple. A number is itself, and BATCH where it depends on the batch.
    """

    symbolic: bool
    values: Mapping[str, Any]

    def __getitem__(self, node: fx.Node) -> Shape:
        found = self.values[node.name]
        assert isinstance(found, Shape), node.name
        return found


def find_shapes(integer: fx.GraphModule, example: Sequence[Any]) -> Shapes:
    """Every node's shape on fake tensors of two batch sizes, or of the example's alone.

    Raises TargetError for inputs that are no tensors.
    """
    for index, value in enumerate(example):
        if not isinstance(value, Tensor):
            raise TargetError(
                f"the network cannot be exported: input {index} is a {type(value).__name__}; only "
                "tensors go in; make it a constant of the model"
            )
    batches = {value.shape[0] if value.dim() else None for value in example}
    if len(batches) == 1 and None not in batches:
        try:
            runs = [_run(integer, [_resized(x, n) for x in example]) for n in _BATCHES]
            return Shapes(True, {name: _merged(runs[0][name], runs[1][name]) for name in runs[0]})
        except (RuntimeError, ValueError):
            # A size of the example is written into the graph, or samples are mixed.
            pass
    run = _run(integer, example)
    return Shapes(False, {name: _merged(value, value) for name, value in run.items()})


def without_plain_values(integer: fx.GraphModule, shapes: Shapes) -> fx.GraphModule:
    """The graph with every number in its place, instead of the nodes that compute it."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def resolved(node: fx.Node) -> Any:
        return new[node] if node in new else shapes.values[node.name]

    for node in integer.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or has_tensors(
            shapes.values[node.name]
        ):
            args: Any = fx.map_arg(node.args, resolved)
            kwargs: Any = fx.map_arg(node.kwargs, resolved)
            copied = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
            copied.meta = dict(node.meta)
            new[node] = copied
    return fx.GraphModule(integer, graph)


def has_tensors(value: Any) -> bool:
    """Whether a value of `Shapes` is a tensor or holds some."""
    return isinstance(value, Shape) or (
        isinstance(value, tuple) and any(has_tensors(part) for part in value)
    )


def leaves(value: Any) -> Iterator[Any]:
    """What nested tuples hold; a `Shape` is one."""
    if isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def _resized(x: Tensor, batch: int) -> Tensor:
    return x.new_empty((batch, *x.shape[1:]))


def _run(integer: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        recorder = _Recorder(integer)
        recorder.run(*(mode.from_tensor(x) for x in inputs))
    return recorder.values


def _merged(first: Any, second: Any) -> Any:
    if isinstance(first, (tuple, list)):
        return tuple(_merged(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, Tensor):
        pairs = list(zip(first.shape, second.shape, strict=True))
        if any(a * _BATCHES[1] != b * _BATCHES[0] for a, b in pairs if a != b):
            raise ValueError("a size is no multiple of the batch")
        if sum(a != b for a, b in pairs) > 1:
            raise ValueError("two sizes grow with the batch")
        sizes = tuple(a if a == b else a // _BATCHES[0] for a, b in pairs)
        return Shape(sizes, tuple(a != b for a, b in pairs), first.dtype)
    return first if first == second else BATCH
