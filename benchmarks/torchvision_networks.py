"""Does every classification network of torchvision compile, and how much of it runs in int8?

    python -m benchmarks.torchvision_networks [NAME ...] [--write]

Random weights and batch-norm statistics, each network in a process of its own; int8 is the share
of the multiply-accumulates, SQNR that of the logits against float, and the difference the largest
of any x86 operation against the reference on the same integers.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import fxquant
from benchmarks import results

NAMES = torchvision.models.list_models(module=torchvision.models)


def size_of(name: str) -> int:
    """Transformers and AlexNet are built for 224 pixels, Inception for at least 75."""
    if name.startswith(("vit", "maxvit", "swin", "alexnet")):
        return 224
    return 128 if name == "inception_v3" else 96


def measure(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            # The head of torchvision's ViT starts at zero: every output would be equal.
            if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                module.weight.normal_(0, 0.02)
    x = torch.randn(2, 3, size_of(name), size_of(name))
    start = time.perf_counter()
    q = fxquant.compile(model, "w8a8", calibration=[x])
    seconds = time.perf_counter() - start
    with torch.no_grad():
        expected = model(x)
    noise = float((expected - q(x)).double().square().sum())
    signal = float(expected.double().square().sum())
    reasons = sorted({row.reason for row in q.report.coverage if row.reason and row.macs})
    return {
        "network": name,
        "int8": q.report.int8_share,
        "sqnr_db": 10 * math.log10(signal / noise) if noise else None,
        "x86_largest_difference": q.report.target_check["largest_difference"],
        "x86_share_differing": q.report.target_check["share_differing"],
        "seconds": seconds,
        "float because": "; ".join(reasons),
    }


def in_own_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.torchvision_networks"]
    run = subprocess.run([*command, "--child", name], capture_output=True, text=True)
    if run.returncode:
        return {"network": name, "error": run.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--child")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    rows = []
    for name in arguments.names or NAMES:
        rows.append(in_own_process(name))
        print(json.dumps(rows[-1]), flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".4f"))
    failed = [row["network"] for row in rows if "error" in row]
    print(f"{len(rows) - len(failed)} of {len(rows)} compiled and ran", *failed)
    if arguments.write:
        print(results.write("torchvision", rows))


if __name__ == "__main__":
    main()
