"""A compiled model as a folder of C++ that stands alone: no torch, no Python at run time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from fxquant.backends.native.build import CODE_FLAGS
from fxquant.backends.native.executor import PlannedProgram, plan_program
from fxquant.backends.native.lower import lower_to_native
from fxquant.backends.native.lowerings import torch_has_the_bits
from fxquant.backends.native.params import KERNELS_FOLDER
from fxquant.errors import InputError
from fxquant.export.folder import new_folder
from fxquant.export.golden import golden_bytes
from fxquant.export.whole import whole_program
from fxquant.version import __version__

__all__ = ["export_cpp"]

TEMPLATE = Path(__file__).parent / "template"
WEIGHTS, GOLDEN = "weights.bin", "golden.bin"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("selftest", "fxquant", "kernels", "test")


def export_cpp(
    folder: Path,
    *,
    integer: fx.GraphModule,
    lowered: fx.GraphModule,
    example: Sequence[Any],
    name: str,
    overwrite: bool,
) -> Path:
    """Write what `CompiledModel.export_cpp` says; `lowered` is the native graph of `integer`."""
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise InputError(
            f"{name!r} cannot be the name of a library and the prefix of its functions: take "
            "letters, digits and underscores, a letter first"
        )
    if any(torch_has_the_bits(node) for node in integer.graph.nodes):
        lowered, _ = lower_to_native(integer, example, frozenset(), without_torch=True)
    program = plan_program(whole_program(lowered, example), example)
    exact = not lowered.meta.get("approximated")
    golden = golden_bytes(integer, example, exact)
    texts = {
        "NAME": name,
        "VERSION": __version__,
        "UNIT": program.unit.strip(),
        "FLAGS": " ".join(CODE_FLAGS),
        "COMPARED": "every bit" if exact else "up to the rounding of its float operations",
        "SIZE": f"{len(program.data) / 1e6:.2f} MB",
        "PORTS": _ports(program),
    }
    with new_folder(folder, overwrite, ("model.h", WEIGHTS)) as room:
        for source in sorted(TEMPLATE.iterdir()):
            (room / source.name).write_text(_fill(source.read_text(), texts))
        (room / "kernels").mkdir()
        for header in sorted(KERNELS_FOLDER.glob("*.h")):
            (room / "kernels" / header.name).write_text(header.read_text())
        (room / WEIGHTS).write_bytes(program.data)
        (room / GOLDEN).write_bytes(golden)
    return folder


def _fill(text: str, texts: Mapping[str, str]) -> str:
    return re.sub(r"@([A-Z]+)@", lambda found: texts[found[1]], text)


def _ports(program: PlannedProgram) -> str:
    """The inputs and outputs as rows of a table."""
    plan = program.plan
    rows = []
    for kind, ports in (("input", plan.inputs), ("output", plan.outputs)):
        for index, port in enumerate(ports):
            sizes = [str(size) for size in port.shape]
            if plan.batch is not None:
                each = port.shape[0] // plan.batch
                sizes[0] = "?" if each == 1 else f"{each} ?"
            kind_of = str(port.dtype).removeprefix("torch.")
            rows.append(f"| {kind} {index} | {kind_of} | [{', '.join(sizes)}] |")
    return "\n".join(rows)
