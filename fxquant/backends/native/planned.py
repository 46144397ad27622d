"""What was planned before, found by what the graph says: neither shapes nor steps again."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import fxquant.integer
from fxquant.backends.native.build import kept, stored
from fxquant.backends.native.params import KERNELS_FOLDER
from fxquant.backends.native.steps import Port
from fxquant.version import __version__
from passes.infra.listing import operation

__all__ = ["Planned", "code_hash", "find", "graph_key", "keep"]


@dataclass(frozen=True)
class Planned:
    """A program in the cache and what is needed to call it.

    `kernels` are those of its unit, `program` the name of its file; `arena` and `total` are in
    bytes a sample.
    """

    kernels: tuple[str, ...]
    program: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    batch: int | None
    arena: int
    total: int


def graph_key(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Of the operations, the constants, the shapes that come in, and of the code that plans."""
    key = hashlib.sha256(code_hash())
    for x in inputs:
        key.update(f"{(x.shape, x.dtype) if isinstance(x, Tensor) else x}|".encode())
    for node in graph_module.graph.nodes:
        words = (node.name, node.op, operation(node), node.args, node.kwargs, node.meta.get("grid"))
        key.update(f"{words}|".encode())
        if node.op == "get_attr":
            value: Any = functools.reduce(getattr, str(node.target).split("."), graph_module)
            data = value.detach().contiguous()
            key.update(f"{data.dtype}{data.shape}|".encode())
            key.update(data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b"")
    return key.hexdigest()[:40]


@functools.cache
def code_hash() -> bytes:
    """Of what decides how a graph is planned and run: versions, the integer semantics, kernels."""
    folders = (Path(__file__).parent, KERNELS_FOLDER, Path(fxquant.integer.__file__).parent)
    paths = (path for folder in folders for path in sorted(folder.glob("*.[ph]*")))
    texts = [f"{__version__} {torch.__version__}".encode(), *(path.read_bytes() for path in paths)]
    return hashlib.sha256(b"\0".join(texts)).digest()


def find(key: str) -> Planned | None:
    """What `keep` kept; None where a file is missing or damaged."""
    data = kept(f"{key}.json")
    if data is None:
        return None
    found: Any = json.loads(data)
    for name in ("inputs", "outputs"):
        found[name] = tuple(Port(getattr(torch, kind), tuple(n)) for kind, n in found[name])
    return Planned(**{**found, "kernels": tuple(found["kernels"])})


def keep(key: str, planned: Planned) -> None:
    """Raises TargetError where nothing can be written."""
    entry = asdict(planned)
    for name in ("inputs", "outputs"):
        ports: tuple[Port, ...] = getattr(planned, name)
        entry[name] = [(str(port.dtype).removeprefix("torch."), list(port.shape)) for port in ports]
    stored(f"{key}.json", json.dumps(entry).encode())
