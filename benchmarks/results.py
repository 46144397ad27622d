"""Where results go: dated JSON beside the command and the machine that made them."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fxquant.measure.benchmark import Machine

FOLDER = Path(__file__).parent / "results"


def write(name: str, data: Any) -> Path:
    """Write ``results/<date>-<name>.json``: command, machine, data."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{datetime.date.today().isoformat()}-{name}.json"
    arguments = " ".join(sys.argv[1:])
    content = {
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {arguments}".strip(),
        "machine": str(Machine.here()),
        "torch": str(torch.__version__),
        "results": data,
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    return path
