"""Does every classification network of torchvision compile, and how much of it runs in int8?

    python -m benchmarks.torchvision_networks [NAME ...] [--family vit swin ...] [--write]
    python -m benchmarks.torchvision_networks --transformers --write
    python -m benchmarks.torchvision_networks --table benchmarks/results/FILE.json ...

Random weights and batch-norm statistics, each network in a process of its own, whose data may not
grow over `--memory`; int8 is the share of the multiply-accumulates, SQNR that of the logits
against float on images that were not calibrated on, and the difference the largest of any x86
operation against the reference on the same integers, in steps. Networks that have attention or
layer norms take the recipe vit_w8a8, all others w8a8. `--table` prints results as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import fxquant
from benchmarks import results
from benchmarks.names import TORCHVISION, one_of

TRANSFORMERS = ("vit", "swin", "convnext", "maxvit")
CALIBRATION, EVALUATION = 4, 4
MEMORY_GB = 10


def recipe_of(name: str) -> str:
    return "vit_w8a8" if name.startswith(TRANSFORMERS) else "w8a8"


def size_of(name: str) -> int:
    """Transformers and AlexNet are built for 224 pixels, Swin v2 for 256, Inception for 75."""
    if name.startswith("swin_v2"):
        return 256
    if name.startswith(("vit", "maxvit", "swin", "alexnet")):
        return 224
    return 128 if name == "inception_v3" else 96


def randomized(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            # The head of torchvision's ViT starts at zero: every output would be equal.
            if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                module.weight.normal_(0, 0.02)
    return model


def measure(name: str, recipe: str) -> dict[str, Any]:
    model = randomized(name)
    x = torch.randn(CALIBRATION + EVALUATION, 3, size_of(name), size_of(name))
    calibration, images = torch.split(x[:CALIBRATION], 1), torch.split(x[CALIBRATION:], 1)
    start = time.perf_counter()
    q = fxquant.compile(model, recipe, calibration=calibration)
    seconds = time.perf_counter() - start
    found = fxquant.evaluate(q, images, reference=model)
    reasons = sorted({row.reason for row in q.report.coverage if row.reason and row.macs})
    return {
        "network": name,
        "recipe": recipe,
        "int8": q.report.int8_share,
        "sqnr_db": found.sqnr_db if found.sqnr_db != math.inf else None,
        "x86_largest_difference": q.report.target_check["largest_difference"],
        "x86_share_differing": q.report.target_check["share_differing"],
        "seconds": seconds,
        "peak_gb": peak_gigabytes(),
        "float because": "; ".join(reasons),
    }


def peak_gigabytes() -> float:
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line[:6] == "VmHWM:")
    return int(kilobytes) / 1024**2


def in_own_process(name: str, recipe: str, memory: float) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.torchvision_networks"]
    command += ["--child", name, "--recipe", recipe, "--memory", str(memory)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:]
        return {"network": name, "error": last or [f"exit code {run.returncode}"]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def coverage_table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as the Markdown table of the documentation."""
    lines = [
        (
            f"`{row['network']}`",
            f"`{row['recipe']}`",
            f"{100 * row['int8']:.1f} %",
            f"{row['x86_largest_difference']:g}",
            "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
        )
        if "error" not in row
        else (f"`{row['network']}`", "", "", "", "; ".join(row["error"]))
        for row in rows
    ]
    headers = (
        "network",
        "recipe",
        "MACs in int8",
        "largest difference from reference, steps",
        "logits SQNR",
    )
    return tabulate(
        lines,
        headers,
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "left", "right", "right", "right"),
    )


def chosen(names: Sequence[str], families: Sequence[str], transformers: bool) -> list[str]:
    """The networks that are named, and those whose names start with a family's."""
    families = [*families, *(TRANSFORMERS if transformers else ())]
    if not names and not families:
        return list(TORCHVISION)
    found = [name for name in TORCHVISION if families and name.startswith(tuple(families))]
    return [*names, *(name for name in found if name not in names)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=one_of(TORCHVISION))
    parser.add_argument("--family", nargs="+", default=[], metavar="PREFIX", help="e.g. swin")
    parser.add_argument("--transformers", action="store_true", help=", ".join(TRANSFORMERS))
    parser.add_argument("--recipe", help="for all; default as above")
    parser.add_argument("--memory", type=float, default=MEMORY_GB, help="GB; default 10")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="print results as Markdown")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        limit = int(arguments.memory * 1024**3)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(json.dumps(measure(arguments.child, arguments.recipe)))
        return
    if arguments.table:
        files = [json.loads(Path(file).read_text())["results"] for file in arguments.table]
        print(coverage_table([row for rows in files for row in rows]))
        return
    rows = []
    for name in chosen(arguments.names, arguments.family, arguments.transformers):
        rows.append(in_own_process(name, arguments.recipe or recipe_of(name), arguments.memory))
        print(json.dumps(rows[-1]), flush=True)
    print(coverage_table(rows))
    failed = [row["network"] for row in rows if "error" in row]
    print(f"{len(rows) - len(failed)} of {len(rows)} compiled and ran", *failed)
    if arguments.write:
        suffix = "-transformers" if arguments.transformers else ""
        suffix += "".join(f"-{family}" for family in arguments.family)
        print(results.write(f"torchvision{suffix}", rows))


if __name__ == "__main__":
    main()
