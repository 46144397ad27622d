"""The golden pair of a file: noise, and what the compiling machine computed from it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.build import kept, stored
from fxquant.backends.native.planned import code_hash
from fxquant.errors import ArtifactError, TargetError
from fxquant.metrics import Closeness
from passes import PassError, TensorInfo
from passes.infra.verify import flatten, run_and_annotate

__all__ = ["Golden", "check_golden", "digest_of", "hash_of", "one_line", "sample"]

_SAMPLE = 1024
# Float operations that a recipe left in the graph (softmax, LayerNorm) may round differently on
# another CPU and move a quantized value by one step; integers alone must agree bit for bit.
_FLOAT_SQNR_DB = 30.0


@dataclass(frozen=True)
class Golden:
    """`hashes` are those of the whole outputs; None where `outputs` holds all of them."""

    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, ...]
    hashes: list[str] | None


def check_golden(path: Path, integer: fx.GraphModule, golden: Golden, digest: str) -> None:
    """The golden input gives the golden output here; every node knows its shape and dtype then.

    Where the file's `digest` is given, the cache of this user keeps what was found, and the next
    time nothing runs. Raises ArtifactError.
    """
    name = f"{hashlib.sha256(f'{digest} {_machine()}'.encode()).hexdigest()[:40]}.golden.json"
    if digest and _annotated(integer, name):
        return
    _run(path, integer, golden)
    if digest:
        infos = {node.name: _encoded(node.meta.get("tensor")) for node in integer.graph.nodes}
        # A full disk costs the next load some time, and this one nothing.
        with suppress(TargetError):
            stored(name, json.dumps(infos).encode())


def _run(path: Path, integer: fx.GraphModule, golden: Golden) -> None:
    try:
        outputs = run_and_annotate(integer, golden.inputs, name="its golden input")
    except PassError as error:
        raise ArtifactError(f"{path}: cannot be run: {one_line(error)}") from error
    found = [value for _, value in flatten(outputs) if isinstance(value, Tensor)]
    same = golden.hashes is None or golden.hashes == [hash_of(value) for value in found]
    if golden.hashes is not None:
        found = [sample(value) for value in found]
    wanted = golden.outputs
    if same and len(found) == len(wanted) and all(map(torch.equal, found, wanted)):
        return
    exact = all(
        node.op != "call_function" or "grid" in node.meta or _dequantizes(node)
        for node in integer.graph.nodes
    )
    if not exact and [v.shape for v in found] == [v.shape for v in wanted]:
        closeness = Closeness()
        for value, other in zip(found, wanted, strict=True):
            closeness.add(other, value)
        if closeness.sqnr_db >= _FLOAT_SQNR_DB:
            return
    raise ArtifactError(
        f"{path}: its golden input does not give its golden output on this machine; compile again "
        "here, and please report it"
    )


def _dequantizes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxquant"


def _machine() -> str:
    """What the golden output may depend on besides the file: the processor and the code."""
    try:
        # Of the first core; its clock differs from one moment to the next.
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        cpu = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        cpu = [platform.processor()]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {cpu} {capability} {code_hash().hex()}"


def _annotated(integer: fx.GraphModule, name: str) -> bool:
    """Whether the cache knows this file's graph; then its nodes have what it knows."""
    try:
        data = kept(name)
    except TargetError:
        return False
    if data is None:
        return False
    infos = json.loads(data)
    if set(infos) != {node.name for node in integer.graph.nodes}:
        return False
    for node in integer.graph.nodes:
        info = _decoded(infos[node.name])
        if info is not None:
            node.meta["tensor"] = info
    return True


def _encoded(info: Any) -> Any:
    """TensorInfo, tuples and mappings of them as JSON."""
    if isinstance(info, TensorInfo):
        return {"shape": info.shape, "dtype": str(info.dtype).removeprefix("torch.")}
    if isinstance(info, tuple):
        return {"items": [_encoded(item) for item in info]}
    if isinstance(info, Mapping):
        return {"entries": [[key, _encoded(item)] for key, item in info.items()]}
    return None


def _decoded(info: Any) -> Any:
    if info is None:
        return None
    if "shape" in info:
        return TensorInfo(tuple(info["shape"]), getattr(torch, info["dtype"]))
    if "items" in info:
        return tuple(_decoded(item) for item in info["items"])
    return {key: _decoded(item) for key, item in info["entries"]}


def sample(value: Tensor) -> Tensor:
    """Elements at equal distances, at most 1024."""
    flat = value.detach().flatten()
    return flat[:: max(1, -(-len(flat) // _SAMPLE))]


def hash_of(value: Tensor) -> str:
    """SHA-256 of a tensor: type, shape and bytes."""
    return digest_of({"": value.detach()}, {})


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors and over the metadata."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().data)
    for key in sorted(metadata):
        sha.update(f"{key}={metadata[key]}|".encode())
    return sha.hexdigest()


def one_line(error: Exception) -> str:
    """The error's class and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
