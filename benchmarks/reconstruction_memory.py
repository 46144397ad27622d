"""What does a reconstruction hold in memory?

    python -m benchmarks.reconstruction_memory [NAME ...] [--recipe w4a8_brecq] [--write]

The peak memory of a process that compiles a torchvision network, random weights, on 1,024 images
of 224×224 drawn batch by batch, beside the recipe's budget; a fresh process for each network. Few
iterations a block (`--iterations`): more of them hold no more.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from typing import Any

import torch
import torchvision
from tabulate import tabulate

import fxquant
from benchmarks import results
from benchmarks.calibration import Images
from benchmarks.names import TORCHVISION, one_of


def peak_gib(name: str, recipe: fxquant.Recipe, images: int) -> float:
    """Of this process, which should do nothing else: memory given back still counts."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    fxquant.compile(model, recipe, calibration=Images(images))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        type=one_of(TORCHVISION),
        default=["resnet18", "mobilenet_v2"],
    )
    parser.add_argument("--recipe", default="w4a8_brecq")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # measure this network here
    arguments = parser.parse_args()
    recipe = fxquant.Recipe.named(arguments.recipe).replace(
        {"reconstruction.iterations": arguments.iterations}
    )
    if arguments.only:
        print(peak_gib(arguments.only, recipe, arguments.images))
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.names:
        command = [sys.executable, "-m", "benchmarks.reconstruction_memory", *sys.argv[1:]]
        found = subprocess.run(
            [*command, "--only", name], check=True, stdout=subprocess.PIPE, text=True
        )
        row = {
            "network": name,
            "recipe": recipe.name,
            "images": arguments.images,
            "peak_gib": float(found.stdout.split()[-1]),
            "budget_gib": recipe.reconstruction.memory_gib,
        }
        rows.append(row)
        print(tabulate([row], headers="keys", floatfmt=".2f"), flush=True)
    if arguments.write:
        results.write("reconstruction-memory", rows)


if __name__ == "__main__":
    main()
