"""How much slower is a network beside a process that burns every core: native against x86?

    python -m benchmarks.busy_neighbour [NAME ...] [--threads 2] [--rounds 6] [--write]

Batch 1, random weights. Rounds alone and rounds beside the neighbour take turns, and so do the two
targets within a round; a slowdown is the median of the second over that of the first. A pure spin
barrier waits for a thread that the scheduler has put aside; one that sleeps gives its core away.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import fxquant
from benchmarks import results
from benchmarks.latency import randomized
from benchmarks.names import TORCHVISION, one_of
from fxquant.timing import in_turns

DEFAULT = ("resnet18", "mobilenet_v2")
TARGETS = ("native", "x86")
_CALLS = 10


@contextmanager
def neighbour() -> Iterator[None]:
    """As many busy processes as this one may use cores."""
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in os.sched_getaffinity(0)]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of each target: slowdown of the median call, and of the slowest tenth of the calls."""
    model, x = randomized(name), torch.randn(1, 3, 224, 224)
    runs: dict[str, Callable[..., Any]] = {
        target: fxquant.compile(model, "w8a8", calibration=x, target=target) for target in TARGETS
    }
    alone: dict[str, list[float]] = {target: [] for target in TARGETS}
    beside: dict[str, list[float]] = {target: [] for target in TARGETS}
    with torch.inference_mode():
        for turn in range(rounds):
            for target, times in in_turns(runs, (x,), (turn,), _CALLS).items():
                alone[target] += times
            with neighbour():
                for target, times in in_turns(runs, (x,), (turn,), _CALLS).items():
                    beside[target] += times
    return {
        target: {
            "median": statistics.median(beside[target]) / statistics.median(alone[target]),
            "slowest tenth": _tenth(beside[target]) / _tenth(alone[target]),
        }
        for target in TARGETS
    }


def _tenth(times: list[float]) -> float:
    return statistics.quantiles(times, n=10)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=one_of(TORCHVISION))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = {}
    for name in arguments.names or DEFAULT:
        rows[name] = measure(name, arguments.rounds)
        for target, found in rows[name].items():
            words = ", ".join(f"{what} {factor:.2f}" for what, factor in found.items())
            print(f"{name:20} {target:8} slowdown: {words}")
    if arguments.write:
        results.write("busy_neighbour", {"threads": arguments.threads, "slowdown": rows})


if __name__ == "__main__":
    main()
