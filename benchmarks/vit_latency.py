"""Is a compiled vision transformer faster than eager float and than PT2E with inductor?

    python -m benchmarks.vit_latency [NAME ...] [--threads 2] [--recipe vit_w8a8] [--write]

Batch 1, random weights, medians of interleaved runs in one process; ratios are to the first peer
that there is. PT2E's quantizer for x86 comes with torchao, which is no dependency: without it the
peer is left out, and a line says so. Inductor compiles C++: it needs a compiler.
"""

from __future__ import annotations

import argparse

import torch
import torchvision
from torch import nn

import fxquant
from benchmarks import results
from benchmarks.names import TORCHVISION, one_of
from benchmarks.networks import vit_tiny
from fxquant.measure.peers import peers

DEFAULT = ("vit_b_16",)


def randomized(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = vit_tiny() if name == "vit_tiny" else torchvision.models.get_model(name, weights=None)
    return made.eval()


def measure(name: str, recipe: str, threads: int, rounds: int) -> fxquant.benchmark.Benchmark:  # type: ignore[name-defined]
    model = randomized(name)
    batches = [torch.randn(1, 3, 224, 224) for _ in range(4)]
    x = batches[0]
    torch.set_num_threads(threads)
    found, refused = peers(model, batches, threads, ["pt2e"])
    for reason in refused.values():
        print(f"without PT2E: {reason}", flush=True)
    q = fxquant.compile(model, recipe, calibration=batches)
    return fxquant.benchmark(
        {"PT2E, inductor" if name == "pt2e" else name: call for name, call in found.items()}
        | {f"fxquant {recipe}": q, "eager float": model},
        x,
        threads=threads,
        rounds=rounds,
        calls=3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=one_of((*TORCHVISION, "vit_tiny")))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--recipe", default="vit_w8a8")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.names or DEFAULT:
        found = measure(name, arguments.recipe, arguments.threads, arguments.rounds)
        print(f"{name}\n{found}\n", flush=True)
        rows[name] = found.to_json()
    if arguments.write:
        print(results.write("vit-latency", rows))


if __name__ == "__main__":
    main()
