"""What does an accuracy target raise, and what does a user reach by hand?

    python -m benchmarks.accuracy_target [NAME ...] [--drop 0.5] [--calibration 100]
        [--images N] [--write]

Compiles each network at 4-bit weights with `fxquant.Drop`, then the recipes that one would try by
hand. Layers are chosen on the calibration's folder, without the images that calibrate, and on every
third of the validation images, of N images in all (default all); all figures are of the other
validation images. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from tabulate import tabulate
from torch import Tensor

import fxquant
from benchmarks import real, results
from benchmarks.names import one_of
from fxquant.data import ImageBatches
from fxquant.measure.evaluate import collect_logits
from fxquant.measure.metric import TOP1
from fxquant.measure.paired import Judged, standard_error

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


def some(batches: ImageBatches, wanted: Callable[[int], bool]) -> ImageBatches:
    """The images whose numbers are wanted."""
    kept = [index for index in range(len(batches.images)) if wanted(index)]
    names, labels = batches.images.names, batches.images.labels
    assert labels is not None
    images = replace(
        batches.images,
        names=tuple(names[index] for index in kept),
        labels=tuple(labels[index] for index in kept),
    )
    return ImageBatches(images, batches.preprocessing, batch_size=batches.batch_size)


class Both:
    """The batches of one set, then those of another."""

    def __init__(self, *parts: ImageBatches) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        return chain(*self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def measure(
    name: str, drop: float, images: int, validation: int | None, target: str
) -> tuple[dict[str, Any], dict[str, str]]:
    network = real.NETWORKS[name]
    model = network.load()
    calibration = network.calibration_batches(images)
    used = frozenset(calibration.images.names)
    folder = network.calibration_batches(validation)
    held_out = network.validation_batches(validation)
    chosen_on = (
        some(folder, lambda index: folder.images.names[index] not in used),
        some(held_out, lambda index: index % 3 == 0),
    )
    reported_on = some(held_out, lambda index: index % 3 != 0)

    def compiled(recipe: fxquant.Recipe, **options: Any) -> fxquant.CompiledModel:
        return fxquant.compile(model, recipe, calibration=calibration, target=target, **options)

    q = compiled(
        fxquant.Recipe.named(RECIPES[name]),
        accuracy_target=fxquant.Drop(drop),
        validation=Both(*chosen_on),
    )
    print(q.report.accuracy, flush=True)
    logits = collect_logits(model, reported_on)
    reference = TOP1.judge(model, reported_on)
    rows = [_row(f"Drop({drop})", q, reported_on, logits, reference)]
    for label, recipe in by_hand(name).items():
        rows.append(_row(label, compiled(recipe), reported_on, logits, reference))
        print(tabulate(rows, headers="keys", floatfmt=".4f"), flush=True)
    accuracy = q.report.accuracy
    assert accuracy is not None
    found = {
        "network": name,
        "recipe": RECIPES[name],
        "target": target,
        "max_drop": drop,
        "calibration_images": len(calibration.images),
        "choosing_images": sum(len(part.images) for part in chosen_on),
        "reported_images": len(reported_on.images),
        "search": accuracy.to_json(),
        "rows": rows,
    }
    digests = {
        f"{name}: calibration": results.digest(calibration),
        f"{name}: choosing, of the calibration's folder": results.digest(chosen_on[0]),
        f"{name}: choosing, of the validation's": results.digest(chosen_on[1]),
        f"{name}: reported": results.digest(reported_on),
    }
    return found, digests


def _row(
    label: str,
    q: fxquant.CompiledModel,
    batches: ImageBatches,
    logits: list[Tensor],
    reference: Judged,
) -> dict[str, Any]:
    error = standard_error(reference, TOP1.judge(q, batches))
    found = fxquant.evaluate(q, batches, reference=logits)
    assert q.plan is not None
    bits = [spec.bits for spec in q.plan.weights.values()]
    return {
        "recipe": label,
        "float_top1": found.reference.top1 if found.reference else None,
        "top1": found.top1,
        "drop": found.top1_drop,
        "drop_error": error and error / 100,
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
