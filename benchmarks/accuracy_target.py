"""What does an accuracy target raise, and what does a user reach by hand?

    python -m benchmarks.accuracy_target [NAME ...] [--drop 0.5] [--calibration 100]
        [--images N] [--write]

Compiles each network at 4-bit weights with `fxquant.Drop`, then the recipes that one would try by
hand. Layers are chosen on every third of N validation images (default all); all figures are of the
other two thirds. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tabulate import tabulate
from torch import Tensor

import fxquant
from benchmarks import real, results
from benchmarks.names import one_of
from fxquant.data import ImageBatches
from fxquant.measure.evaluate import collect_logits

RECIPES = {"mobilenet_v2": "w4a8", "vit_tiny": "vit_w4a8_integer"}
EIGHT_BITS = {"mobilenet_v2": "w8a8", "vit_tiny": "vit_w8a8_integer"}
_8 = {"bits": 8}


def by_hand(name: str) -> dict[str, fxquant.Recipe]:
    """What one would try: a better rounding, the outer layers at 8 bits, both, all of them."""
    named = fxquant.Recipe.named
    outer = [{"position": place, "weights": _8} for place in ("first", "last")]
    plain, gptq = named(RECIPES[name]), named(f"{RECIPES[name]}_gptq")
    return {
        plain.name: plain,
        gptq.name: gptq,
        f"{plain.name}, first and last at 8": plain.replace({"overrides": outer}),
        f"{gptq.name}, first and last at 8": gptq.replace({"overrides": outer}),
        EIGHT_BITS[name]: named(EIGHT_BITS[name]),
    }


def thirds(batches: ImageBatches) -> tuple[ImageBatches, ImageBatches]:
    """Every third image, and the others."""

    def some(wanted: Callable[[int], bool]) -> ImageBatches:
        kept = [index for index in range(len(batches.images)) if wanted(index)]
        names, labels = batches.images.names, batches.images.labels
        assert labels is not None
        images = replace(
            batches.images,
            names=tuple(names[index] for index in kept),
            labels=tuple(labels[index] for index in kept),
        )
        return ImageBatches(images, batches.preprocessing, batch_size=batches.batch_size)

    return some(lambda index: index % 3 == 0), some(lambda index: index % 3 != 0)


def measure(
    name: str, drop: float, images: int, validation: int | None, target: str
) -> tuple[dict[str, Any], dict[str, str]]:
    network = real.NETWORKS[name]
    model = network.load()
    calibration = network.calibration_batches(images)
    chosen_on, reported_on = thirds(network.validation_batches(validation))

    def compiled(recipe: fxquant.Recipe, **options: Any) -> fxquant.CompiledModel:
        return fxquant.compile(model, recipe, calibration=calibration, target=target, **options)

    q = compiled(
        fxquant.Recipe.named(RECIPES[name]),
        accuracy_target=fxquant.Drop(drop),
        validation=chosen_on,
    )
    print(q.report.accuracy, flush=True)
    logits = collect_logits(model, reported_on)
    rows = [_row(f"Drop({drop})", q, reported_on, logits)]
    for label, recipe in by_hand(name).items():
        rows.append(_row(label, compiled(recipe), reported_on, logits))
        print(tabulate(rows, headers="keys", floatfmt=".4f"), flush=True)
    accuracy = q.report.accuracy
    assert accuracy is not None
    found = {
        "network": name,
        "recipe": RECIPES[name],
        "target": target,
        "max_drop": drop,
        "calibration_images": len(calibration.images),
        "choosing_images": len(chosen_on.images),
        "reported_images": len(reported_on.images),
        "search": accuracy.to_json(),
        "rows": rows,
    }
    digests = {
        f"{name}: calibration": results.digest(calibration),
        f"{name}: choosing": results.digest(chosen_on),
        f"{name}: reported": results.digest(reported_on),
    }
    return found, digests


def _row(
    label: str, q: fxquant.CompiledModel, batches: ImageBatches, logits: list[Tensor]
) -> dict[str, Any]:
    found = fxquant.evaluate(q, batches, reference=logits)
    assert q.plan is not None
    bits = [spec.bits for spec in q.plan.weights.values()]
    return {
        "recipe": label,
        "float_top1": found.reference.top1 if found.reference else None,
        "top1": found.top1,
        "drop": found.top1_drop,
        "agreement": found.agreement,
        "sqnr_db": found.sqnr_db,
        "size_mb": q.report.size_bytes / 1e6,
        "int8_share": q.report.int8_share,
        "layers_at_8_bits": sum(width == 8 for width in bits),
        "layers": len(bits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=one_of(RECIPES))
    parser.add_argument("--drop", type=float, default=0.5)
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--images", type=int)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.names or RECIPES:
        found, digests = measure(
            name, arguments.drop, arguments.calibration, arguments.images, arguments.target
        )
        if arguments.write:
            print(results.write(f"accuracy-target-{name}", found, images=digests), flush=True)


if __name__ == "__main__":
    main()
