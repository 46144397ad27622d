"""Is int8 faster than float on a processor without VNNI? Both are held to AVX2.

    python -m benchmarks.without_vnni [NAME ...] [--threads 2] [--batch 1] [--write]

Target ``native`` under ``FXQUANT_ISA=avx2`` beside the float network under torch, channels last,
under ``ATEN_CPU_CAPABILITY=avx2``, ``ONEDNN_MAX_CPU_ISA=AVX2`` and ``MKL_ENABLE_INSTRUCTIONS=AVX2``
(torch's linear layers are MKL's, which obeys neither of the others): medians of calls in turns in
one process, which starts itself again with these variables. Random weights.

With `--write` a row is in benchmarks/results/ as soon as it is measured, and a run that was cut
short goes on behind the rows of its commit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import Any

import torch
from tabulate import tabulate

import fxquant
from benchmarks import results
from benchmarks.peers import NETWORKS, TRANSFORMERS, randomized
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
    model = randomized(name)
    torch.manual_seed(1)
    x = torch.randn(arguments.batch, 3, 224, 224)
    recipe = "vit_w8a8" if name.startswith(TRANSFORMERS) else "w8a8"
    q = fxquant.compile(model, recipe, calibration=x, target="native")
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
        "recipe": recipe,
        "isa": isa,
        "equal_to_reference": exact,
        "times_faster_than_float": medians[FLOAT] / medians[NATIVE],
        "timed": timed.to_json(),
    }


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
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in HELD.items()):
        # Torch asks for its variables when it is loaded.
        command = [sys.executable, "-m", "benchmarks.without_vnni", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **HELD})
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
