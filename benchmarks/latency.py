"""Is the compiled network faster than eager float and than PyTorch's FX graph mode?

    python -m benchmarks.latency [NAME ...] [--threads 2] [--write]

Batch 1, random weights, medians of interleaved runs in one process; ratios are to FX graph mode
with the onednn engine. Its linear layer falls to a reference kernel where the zero point is not 0,
as in MobileNetV2, whose ReLU6 it does not fuse; with the x86 engine it has no such layer.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
import torchvision
from torch import nn

import fxquant
from benchmarks import results
from benchmarks.names import TORCHVISION, one_of

DEFAULT = ("resnet18", "resnet50", "mobilenet_v2", "shufflenet_v2_x1_0")


def randomized(name: str) -> nn.Module:
    """The network with random weights and batch norms as different as trained ones."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def fx_graph_mode(model: nn.Module, x: torch.Tensor, engine: str) -> Any:
    """PyTorch's FX graph mode quantization with the default qconfig of `engine`."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = engine
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(engine), (x,))
    for _ in range(2):
        prepared(x)
    return convert_fx(prepared)


def measure(name: str, threads: int, rounds: int) -> fxquant.benchmark.Benchmark:  # type: ignore[name-defined]
    model = randomized(name)
    x = torch.randn(1, 3, 224, 224)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        peers = {
            f"fx graph mode, {engine}": fx_graph_mode(model, x, engine)
            for engine in ("onednn", "x86")
        }
    q = fxquant.compile(model, "w8a8", calibration=[x, torch.randn(1, 3, 224, 224)])
    return fxquant.benchmark(
        {**peers, "fxquant x86": q, "eager float": model},
        x,
        threads=threads,
        rounds=rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=one_of(TORCHVISION))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.names or DEFAULT:
        found = measure(name, arguments.threads, arguments.rounds)
        print(f"{name}\n{found}\n", flush=True)
        rows[name] = found.to_json()
    if arguments.write:
        print(results.write("latency", rows))


if __name__ == "__main__":
    main()
