"""Is a compiled vision transformer faster than eager float and than PT2E with inductor?

    python -m benchmarks.vit_latency [NAME ...] [--threads 2] [--recipe vit_w8a8] [--write]

Batch 1, random weights, medians of interleaved runs in one process; ratios are to the first peer
that there is. PT2E's quantizer for x86 comes with torchao, which is no dependency: without it the
peer is left out, and a line says so. Inductor compiles C++: it needs a compiler.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import fxquant
from benchmarks import results
from benchmarks.names import TORCHVISION, one_of
from benchmarks.networks import vit_tiny

DEFAULT = ("vit_b_16",)


def randomized(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = vit_tiny() if name == "vit_tiny" else torchvision.models.get_model(name, weights=None)
    return made.eval()


def pt2e(model: nn.Module, x: Tensor, batches: list[Tensor]) -> Callable[..., Any]:
    """PT2E with X86InductorQuantizer's default configuration, compiled by inductor with freezing.

    Raises ImportError without torchao.
    """
    from torch._inductor import config

    steps = import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = steps.prepare_pt2e(exported, quantizer)
    for batch in batches:
        prepared(batch)
    converted = steps.convert_pt2e(prepared)
    # Inductor finds the quantized layers, and packs their weights, while it freezes the graph.
    compiled: Callable[..., Any] = torch.compile(converted)
    with torch.inference_mode(), config.patch(freezing=True):
        compiled(x)
    return compiled


def peers(model: nn.Module, x: Tensor, batches: list[Tensor]) -> dict[str, Callable[..., Any]]:
    """What there is to compare with; a line for what there is not."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return {"PT2E, inductor": pt2e(model, x, batches)}
        except ImportError as error:
            print(f"without PT2E: {error}", flush=True)
    return {}


def measure(name: str, recipe: str, threads: int, rounds: int) -> fxquant.benchmark.Benchmark:  # type: ignore[name-defined]
    model = randomized(name)
    batches = [torch.randn(1, 3, 224, 224) for _ in range(4)]
    x = batches[0]
    torch.set_num_threads(threads)
    found = peers(model, x, batches)
    q = fxquant.compile(model, recipe, calibration=batches)
    return fxquant.benchmark(
        {**found, f"fxquant {recipe}": q, "eager float": model},
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
