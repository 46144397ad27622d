"""Where results go: dated JSON that says which code, command, machine and images made it."""

from __future__ import annotations

import datetime
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from fxquant.measure.benchmark import Machine

FOLDER = Path(__file__).parent / "results"


def write(name: str, data: Any, *, images: Mapping[str, str] | None = None) -> Path:
    """Write ``results/<date>-<name>.json``; `images` are digests by the images' use."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{datetime.date.today().isoformat()}-{name}.json"
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    content = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--", ":(top,exclude)benchmarks/results")),
        "machine": str(Machine.here()),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "images": dict(images or {}),
        "results": data,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
    temporary.replace(path)
    return path


def commit() -> str:
    """That of the code that runs."""
    return _git("rev-parse", "HEAD")


def digest(batches: Iterable[Any]) -> str:
    """SHA-256 over the digests of all images of ``(images, labels)``, labels included."""
    whole = hashlib.sha256()
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            whole.update(_digest(image) + int(label).to_bytes(4, "little", signed=True))
    return whole.hexdigest()


def _digest(image: Tensor) -> bytes:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).digest()


def _git(*arguments: str) -> str:
    """What git says of the code that runs; "" outside of a repository."""
    found = subprocess.run(
        ["git", "-C", str(FOLDER.parent), *arguments], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()
