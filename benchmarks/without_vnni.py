"""Is int8 faster than float on a processor without VNNI? Both are held to AVX2.

    python -m benchmarks.without_vnni [NAME ...] [--threads 2] [--batch 1] [--write]

Target ``native`` under ``FXQUANT_ISA=avx2`` beside the float network under torch, channels last,
under ``ATEN_CPU_CAPABILITY=avx2``, ``ONEDNN_MAX_CPU_ISA=AVX2`` and ``MKL_ENABLE_INSTRUCTIONS=AVX2``
(torch's linear layers are MKL's, which obeys neither of the others): medians of calls in turns in
one process, which starts itself again with these variables. Random weights.

With `--write` a row is in benchmarks/results/ as soon as it is measured, and a run that was cut
short goes on behind the rows of its commit. `--files`: networks are loaded from this folder where
an earlier run has saved them; with `--rounds 0` they are saved and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxquant
from benchmarks import results
from benchmarks.latency import randomized
from benchmarks.peers import NETWORKS, TRANSFORMERS
from fxquant.measure.benchmark import benchmark

HELD = {
    "FXQUANT_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
NATIVE, FLOAT = "fxquant native", "eager float, channels last"


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """How many times faster than float the quantized network is, and whether it is exact."""
    model, x = randomized(name), example(arguments.batch)
    q = compiled(name, model, x, arguments.files)
    (isa,) = {
        segment.program.isa
        for program in q.stages["native"].children()
        for segment in getattr(program, "segments", ())
    }
    exact = torch.equal(q(x), q.to_target("reference")(x))
    model = model.to(memory_format=torch.channels_last)
    candidates = {NATIVE: q, FLOAT: model}
    timed = benchmark(candidates, x, threads=arguments.threads, rounds=arguments.rounds)
    medians = {timing.name: timing.median_ms for timing in timed.timings}
    return {
        "network": name,
        "recipe": recipe_of(name),
        "isa": isa,
        "equal_to_reference": exact,
        "times_faster_than_float": medians[FLOAT] / medians[NATIVE],
        "timed": timed.to_json(),
    }


def recipe_of(name: str) -> str:
    """The default of the kind of network."""
    return "vit_w8a8" if name.startswith(TRANSFORMERS) else "w8a8"


def example(batch: int) -> torch.Tensor:
    """Random images, always the same."""
    torch.manual_seed(1)
    return torch.randn(batch, 3, 224, 224)


def compiled(
    name: str, model: nn.Module, x: torch.Tensor, folder: Path | None
) -> fxquant.CompiledModel:
    """The network on target native; from its file in `folder`, where it is there."""
    path = None if folder is None else folder / f"{name}.fxq"
    if path is None or not path.exists():
        q = fxquant.compile(model, recipe_of(name), calibration=x, target="native")
        if path is not None:
            q.save(path)
            # What is loaded is compared on its golden input, once.
            fxquant.load(path, "native")
        return q
    return fxquant.load(path, "native")


def table(rows: list[dict[str, Any]]) -> str:
    """A line a network, and the geometric mean."""
    lines = [
        [row["network"], row["times_faster_than_float"], row["equal_to_reference"]] for row in rows
    ]
    mean = math.exp(sum(math.log(row["times_faster_than_float"]) for row in rows) / len(rows))
    headers = ("", "times faster than float", "equal to reference")
    return tabulate([*lines, ["geometric mean", mean, ""]], headers=headers, floatfmt=".2f")


def measured(kind: str) -> dict[str, dict[str, Any]]:
    """The rows of the newest file that this commit has measured, by network."""
    files = sorted(results.FOLDER.glob(f"????-??-??-{kind}.json"))
    rows = json.loads(files[-1].read_text())["results"]["networks"] if files else []
    return {row["network"]: row for row in rows if row["commit"] == results.commit()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in HELD.items()):
        # Torch asks for its variables when it is loaded.
        command = [sys.executable, "-m", "benchmarks.without_vnni", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **HELD})
    if not arguments.rounds:
        for name in arguments.names or NETWORKS:
            compiled(name, randomized(name), example(arguments.batch), arguments.files)
        return
    kind = f"without-vnni-batch{arguments.batch}-threads{arguments.threads}"
    rows = measured(kind) if arguments.write else {}
    for name in arguments.names or NETWORKS:
        if name in rows:
            continue
        rows[name] = measure(name, arguments) | {"commit": results.commit()}
        print(table([rows[name]]), flush=True)
        if arguments.write:
            results.write(kind, {"held": HELD, "networks": list(rows.values())})
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
