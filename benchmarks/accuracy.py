"""How close is the quantized network to the float one, on real weights and images?

    python -m benchmarks.accuracy [NAME ...] [--recipe w8a8] [--set KEY=VALUE] [--images 250]

Prints float and quantized top-1, agreement and logits SQNR on the same images for `x86`, checks
that `reference` and the saved-and-loaded file agree bit for bit on `--reference` images, and
writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxquant
from benchmarks import real, results
from benchmarks.names import one_of
from fxquant.measure.evaluate import evaluate


def measure(name: str, recipe: fxquant.Recipe, images: int, reference: int) -> dict[str, Any]:
    network = real.NETWORKS[name]
    model = network.load()
    calibration = network.calibration_batches(images)
    q = fxquant.compile(model, recipe, calibration=calibration, progress=True)
    found = evaluate(q, network.validation_batches(), reference=model, progress=True)
    row = {
        "network": name,
        "float_top1": found.reference.top1 if found.reference else None,
        "top1": found.top1,
        "drop": found.top1_drop,
        "agreement": found.agreement,
        "sqnr_db": found.sqnr_db,
        "int8_share": q.report.int8_share,
        "size_mb": q.report.size_bytes / 1e6,
        "x86_largest_difference": q.report.target_check["largest_difference"],
        "x86_share_differing": q.report.target_check["share_differing"],
    }
    if reference:
        row |= against_reference(q, network, reference)
    return row


def against_reference(q: Any, network: real.RealNetwork, images: int) -> dict[str, Any]:
    """Reference = saved and loaded, bit for bit; x86 agrees in how many outputs?"""
    exact = q.to_target("reference")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.fxq"
        q.save(path)
        loaded = fxquant.load(path, target="reference")
        size = path.stat().st_size
    equal, agree, seen = True, 0, 0
    for batch, _ in network.validation_batches(images, 10):
        want, same, fast = exact(batch), loaded(batch), q(batch)
        equal &= torch.equal(want, same)
        agree += int((want.argmax(1) == fast.argmax(1)).sum())
        seen += len(batch)
    return {
        "loaded_equals_reference": equal,
        "x86_agrees_with_reference": agree / seen,
        "reference_images": seen,
        "file_mb": size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=one_of(real.NETWORKS))
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--reference", type=int, default=0, help="images for the bit-exact check")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    recipe = fxquant.Recipe.named(arguments.recipe)
    if arguments.set:
        recipe = recipe.replace(dict(map(fxquant.Recipe.parse_assignment, arguments.set)))
    names = arguments.names or [name for name in real.NETWORKS if not name.startswith("vit")]
    rows = []
    for name in names:
        rows.append(measure(name, recipe, arguments.images, arguments.reference))
        print(tabulate([rows[-1]], headers="keys", floatfmt=".4f"), flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".4f"))
    if arguments.write:
        print(results.write(f"accuracy-{arguments.recipe}", rows))


if __name__ == "__main__":
    main()
