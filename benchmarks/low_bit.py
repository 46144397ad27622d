"""What each way of rounding is worth at low bit widths, on real weights and images.

    python -m benchmarks.low_bit cifar_resnet20 --recipes w4a8 w4a8_gptq w4a8_brecq [--images 1024]
        [--seeds 0 1 2]

One row a recipe and seed, float and quantized on the same images, the integer graph on `x86`; the
seconds of the compile and the process's peak memory beside them. With `--write` the rows are in
benchmarks/results/ as soon as each is done.
"""

from __future__ import annotations

import argparse
import resource
import time
from itertools import product
from typing import Any

from tabulate import tabulate

import fxquant
from benchmarks import real, results
from fxquant.measure.evaluate import evaluate


def measure(network: real.RealNetwork, recipe: fxquant.Recipe, images: int) -> dict[str, Any]:
    model = network.load()
    start = time.perf_counter()
    q = fxquant.compile(model, recipe, calibration=network.calibration_batches(images))
    seconds = time.perf_counter() - start
    found = evaluate(q, network.validation_batches(), reference=model)
    return {
        "recipe": recipe.name,
        "seed": recipe.reconstruction.seed,
        "iterations": recipe.reconstruction.iterations,
        "float_top1": found.reference.top1 if found.reference else None,
        "top1": found.top1,
        "drop": found.top1_drop,
        "agreement": found.agreement,
        "sqnr_db": found.sqnr_db,
        "compile_seconds": round(seconds),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=sorted(real.NETWORKS))
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of what is random")
    parser.add_argument("--write", action="store_true")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    changes = dict(fxquant.Recipe.parse_assignment(text) for text in arguments.set)
    rows: list[dict[str, Any]] = []
    network = real.NETWORKS[arguments.name]
    images = {
        "calibration": results.digest(network.calibration_batches(arguments.images)),
        "validation": results.digest(network.validation_batches()),
    }
    for name, seed in product(arguments.recipes, arguments.seeds):
        recipe = fxquant.Recipe.named(name).replace(changes | {"reconstruction.seed": seed})
        rows.append(measure(network, recipe, arguments.images))
        print(tabulate(rows, headers="keys", floatfmt=".4f"), flush=True)
        if arguments.write:
            results.write(f"low-bit-{arguments.name}-{arguments.recipes[0]}", rows, images=images)


if __name__ == "__main__":
    main()
