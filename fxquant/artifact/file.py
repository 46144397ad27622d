"""One safetensors file: integer graph and weights, recipe, versions, a golden pair.

Tensors are stored under ``weights.<path>``; those of at most four or two bits several codes to a
byte under ``weights4.<path>`` or ``weights2.<path>``, with their shapes in the metadata and, where
channels have their own, ``offsets.<path>``; equal ones once. The golden pair is under
``golden.input.<i>``, noise in the range of the example, and ``golden.output.<i>``, a sample of
each output whose hash is in the metadata; the rest is JSON in the metadata. Loading resolves
operations by name from a closed table and runs no code from the file; a digest over everything
finds damage, and the golden pair proves that this machine computes what the compiling one did.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from fxquant.artifact.golden import (
    Golden,
    check_golden,
    digest_of,
    hash_of,
    one_line,
    sample,
)
from fxquant.artifact.graph_json import GraphFormatError, decode_graph, encode_graph
from fxquant.artifact.packing import WIDTHS, Packed, pack, unpack
from fxquant.errors import ArtifactError
from fxquant.recipe import Recipe
from fxquant.report.report import Report
from passes.infra.verify import flatten

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "Artifact",
    "contents",
    "golden_inputs",
    "load_artifact",
    "save_artifact",
]

FORMAT_VERSION = 2
METADATA_KEY = "fxquant"


@dataclass(frozen=True)
class Artifact:
    """What a file holds, checked."""

    integer: fx.GraphModule
    recipe: Recipe
    report: Report
    example: tuple[Any, ...]
    versions: Mapping[str, str]


def save_artifact(
    path: Path,
    *,
    integer: fx.GraphModule,
    recipe: Recipe,
    report: Report,
    example: tuple[Any, ...],
) -> None:
    """Write the file beside `path`, then rename it into place. Raises ArtifactError."""
    if not path.name or "\0" in str(path):
        raise ArtifactError(f"cannot write {str(path)!r}: it is no name of a file")
    try:
        graph = encode_graph(integer)
    except GraphFormatError as error:
        raise ArtifactError(f"cannot save {path}: {error}") from error
    # Nobody's image goes into the file.
    inputs = golden_inputs(example)
    with torch.no_grad():
        outputs = integer(*(_expand(value) for value in inputs))
    found = [value for _, value in flatten(outputs) if isinstance(value, Tensor)]
    tensors, metadata = contents(graph, integer, inputs, found, recipe, report)
    metadata["digest"] = digest_of(tensors, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One key: safetensors writes several in an order that differs from run to run.
        whole = json.dumps(metadata, sort_keys=True)
        save_file(tensors, str(temporary), metadata={METADATA_KEY: whole})
        # Safetensors lets the owner alone read what it writes.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def contents(
    graph: Mapping[str, Any],
    integer: fx.GraphModule,
    inputs: tuple[Any, ...],
    outputs: list[Tensor],
    recipe: Recipe,
    report: Report,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, but for the digest."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, value in integer.state_dict().items():
        packed = pack(value)
        if packed is None:
            tensors[f"weights.{name}"] = value
            continue
        tensors[f"weights{packed.bits}.{name}"] = packed.codes
        shapes[name] = list(value.shape)
        if packed.offsets is not None:
            tensors[f"offsets.{name}"] = packed.offsets
    tensors, aliases = _once(tensors)
    tensors |= {
        f"golden.input.{index}": value
        for index, value in enumerate(inputs)
        if isinstance(value, Tensor)
    }
    tensors |= {f"golden.output.{index}": sample(value) for index, value in enumerate(outputs)}
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "graph": json.dumps(graph),
        "shapes": json.dumps(shapes),
        "aliases": json.dumps(aliases),
        "golden": json.dumps([hash_of(value) for value in outputs]),
        "recipe": json.dumps(recipe.to_dict()),
        "report": json.dumps(report.to_json()),
        "versions": json.dumps(_versions()),
    }
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    return tensors, metadata


def golden_inputs(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Seeded noise in the shapes and the ranges of `example`, in half precision."""
    return tuple(_compact(_noise(value)) for value in example)


def load_artifact(path: Path, *, remember: bool = False) -> Artifact:
    """Read and check a file.

    With `remember` the cache keeps that a file's golden pair held here: the same bytes do not run
    again on the same processor with the same code.
    Raises ArtifactError, naming the file, where it is missing, damaged, truncated, foreign or
    newer than this version, or where the golden input does not give the golden output here.
    """
    tensors, metadata, digest = _read(path)
    try:
        recipe = Recipe.from_dict(json.loads(metadata["recipe"]))
        report = Report.from_json(json.loads(metadata["report"]))
        report = replace(report, size_bytes=path.stat().st_size)
        versions = json.loads(metadata["versions"])
        tensors |= {
            name: tensors[kept] for name, kept in json.loads(metadata.get("aliases", "{}")).items()
        }
        weights = {
            name.removeprefix("weights."): value
            for name, value in tensors.items()
            if name.startswith("weights.")
        }
        weights |= {
            name: unpack(_packed(tensors, name), shape)
            for name, shape in json.loads(metadata["shapes"]).items()
        }
        integer = decode_graph(json.loads(metadata["graph"]), weights)
        example = tuple(_expand(value) for value in _numbered(tensors, "golden.input."))
        golden = _numbered(tensors, "golden.output.")
        hashes = json.loads(metadata["golden"]) if "golden" in metadata else None
    except Exception as error:
        # Whatever a crafted file makes fail: nothing of it has run.
        raise ArtifactError(f"{path}: cannot be understood: {one_line(error)}") from error
    check_golden(path, integer, Golden(example, tuple(golden), hashes), digest if remember else "")
    return Artifact(integer, recipe, report, example, versions)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and the digest of both."""
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = _unpack(file.metadata() or {})
            if metadata is None:
                raise ArtifactError(
                    f"{path}: is a safetensors file but no fxquant artefact; `fxquant compile "
                    "--save` writes one"
                )
            version = metadata.get("format_version", "?")
            if not version.isdigit() or int(version) > FORMAT_VERSION:
                raise ArtifactError(
                    f"{path}: has format version {version}, this fxquant reads up to "
                    f"{FORMAT_VERSION}: upgrade fxquant to load it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(
            f"{path}: is damaged, truncated or no fxquant artefact ({error})"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    digest = metadata.pop("digest", "")
    if digest != digest_of(tensors, metadata):
        raise ArtifactError(f"{path}: is damaged: its contents do not match their digest")
    return tensors, metadata, digest


def _packed(tensors: Mapping[str, Tensor], name: str) -> Packed:
    bits = next(bits for bits in WIDTHS if f"weights{bits}.{name}" in tensors)
    return Packed(bits, tensors[f"weights{bits}.{name}"], tensors.get(f"offsets.{name}"))


def _unpack(stored: Mapping[str, str]) -> dict[str, str] | None:
    """The metadata that `save_artifact` packed, or None where there is none of ours."""
    try:
        whole = json.loads(stored[METADATA_KEY])
    except (KeyError, ValueError, RecursionError):
        return None
    is_ours = isinstance(whole, dict) and all(isinstance(value, str) for value in whole.values())
    return whole if is_ours else None


def _noise(value: Any) -> Any:
    """Of the shape and the range of `value`, always the same; of noise, that noise."""
    if not isinstance(value, Tensor) or not value.numel() or value.is_complex():
        return value
    # What `_compact` stores has a range of half precision, so that the noise of noise is itself.
    value = _expand(_compact(value))
    low, high = value.min(), value.max()
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(value.shape, generator=generator, dtype=torch.float64)
    noise = low.double() + uniform * (high.double() - low.double())
    noise = (noise if value.is_floating_point() else noise.round()).to(value.dtype).flatten()
    noise[0], noise[-1] = low, high
    return noise.view(value.shape)


def _once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Without those that another equals, and the name of that other one."""
    kept: dict[str, str] = {}
    names = {name: kept.setdefault(hash_of(value), name) for name, value in tensors.items()}
    aliases = {name: first for name, first in names.items() if name != first}
    return {name: tensors[name] for name in kept.values()}, aliases


def _compact(value: Any) -> Any:
    """The golden input in half precision, which loses nothing that matters here."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    half = value.half()
    return half if bool(half.isfinite().all()) else value


def _expand(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype == torch.float16
    return value.float() if is_half else value


def _numbered(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    count = sum(name.startswith(prefix) for name in tensors)
    return [tensors[f"{prefix}{index}"] for index in range(count)]


def _versions() -> dict[str, str]:
    import torchvision  # it takes longer to import than all of fxquant

    from fxquant.version import __version__

    return {
        "fxquant": __version__,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
    }
