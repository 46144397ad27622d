"""What a failed pass leaves behind: the graph before it, as text and to run it again.

before.txt        the listing of the graph before the pass
before.pt         that graph with the meta of its nodes, and the probe inputs
error.txt         the error with its traceback, versions, and the lines that run it again
"""

from __future__ import annotations

import platform
import sys
import traceback
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from passes.infra import listing
from passes.infra.base import Pass
from passes.infra.errors import PassError

__all__ = ["Failure", "load_reproducer", "write_reproducer"]


@dataclass(frozen=True)
class Failure:
    """A pass that failed, the graph before it, and the inputs on which passes are verified."""

    step: Pass
    before: fx.GraphModule
    probe: tuple[Any, ...]


def write_reproducer(folder: Path, error: PassError) -> None:
    """Write the files of a pipeline's error into `folder`, which is made.

    A graph that cannot be pickled has no ``before.pt``, and ``error.txt`` says why.
    """
    failure: Failure = error.failure
    step, before = failure.step, failure.before
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "before.txt").write_text(listing.to_text(before))
    saved = "before.pt holds the graph and the probe inputs."
    try:
        torch.save((_pack(before), failure.probe), folder / "before.pt")
    except Exception as problem:
        (folder / "before.pt").unlink(missing_ok=True)
        saved = f"The graph cannot be pickled ({problem}): compile the model again."
    kind = type(step)
    lines = [
        *traceback.format_exception(error),
        f"\nPython {platform.python_version()}, torch {torch.__version__}. {saved}\n\n",
        "from pathlib import Path\n",
        "from passes import Pipeline\n",
        "from passes.infra.reproducer import load_reproducer\n",
        f"from {kind.__module__} import {kind.__name__}\n\n",
        f"graph, probe = load_reproducer(Path({str(folder)!r}))\n",
        f"Pipeline([{kind.__name__}(...)]).run(graph, probe)  # arguments: {_arguments(step)}\n",
    ]
    (folder / "error.txt").write_text("".join(lines))


def load_reproducer(folder: Path) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The graph before the failed pass, its nodes with names and meta, and the probe inputs.

    It unpickles modules of all kinds: load only what you trust.
    """
    packed, probe = torch.load(folder / "before.pt", weights_only=False)
    return _unpack(packed), probe


# fx pickles a graph as code and traces that again, into functions that were one node: nodes are
# stored as they are instead.


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass(frozen=True)
class _Function:
    """A function where its module has it: some of torch's and all operators do not pickle."""

    module: str
    path: tuple[str, ...]
    function: Any = None

    def root(self) -> Any:
        return self.function if self.function is not None else import_module(self.module)


def _pack_target(target: Any) -> Any:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return _Function("torch", ("ops", *str(target).split(".")))
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    if module in sys.modules and getattr(sys.modules[module], name, None) is target:
        return _Function(module, (name,))
    return _Function("", (), target)


def _pack(graph_module: fx.GraphModule) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    root = nn.Module()
    for name, value in vars(graph_module).items():
        if name in ("_modules", "_parameters", "_buffers") or isinstance(value, torch.Tensor):
            vars(root)[name] = value
    map_arg: Any = fx.map_arg
    rows = []
    for node in graph_module.graph.nodes:
        args, kwargs, meta = (
            map_arg(value, lambda source: _Name(source.name))
            for value in (node.args, node.kwargs, dict(node.meta))
        )
        rows.append((node.op, node.name, _pack_target(node.target), args, kwargs, meta))
    return root, rows


def _unpack(packed: tuple[nn.Module, list[tuple[Any, ...]]]) -> fx.GraphModule:
    root, rows = packed
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def named(value: Any) -> Any:
        if isinstance(value, _Name):
            return nodes[value.name]
        if isinstance(value, slice):
            return slice(named(value.start), named(value.stop), named(value.step))
        if isinstance(value, (tuple, list)):
            return type(value)([named(item) for item in value])
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        return value

    for op, name, target, args, kwargs, meta in rows:
        called = reduce(getattr, target.path, target.root()) if op == "call_function" else target
        node = nodes[name] = graph.create_node(op, called, named(args), named(kwargs), name=name)
        node.meta = dict(named(meta))
    return fx.GraphModule(root, graph)


def _arguments(step: Pass) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in vars(step).items()) or "none"
