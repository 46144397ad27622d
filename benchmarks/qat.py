"""What quantization-aware training adds to a post-training row, on real weights and images.

    python -m benchmarks.qat [NAME] [--recipe w4a4_head_stem8] [--set KEY=VALUE] [--epochs 12]

Compiles with the network's calibration images, finetunes on the same images with their labels
(random shifts and flips), and prints top-1 on the validation images of both, of the integer graph
on `x86`. No epoch is picked by them. Labels also adapt the network to its training images, which
can lift it above the float network; `--teacher-only` shows what comes without them. One thread
unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import fxquant
from benchmarks import real, results
from benchmarks.names import one_of
from fxquant.measure.evaluate import evaluate
from fxquant.qat.finetune import finetune


class Augmented:
    """Shuffled batches, each image flipped and shifted by chance; another order each time.

    Drawn from torch's generator, which `finetune` seeds.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, shift: int) -> None:
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.shift = shift

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.images)).split(self.batch_size)[: len(self)]:
            yield self._augment(self.images[chosen]), self.labels[chosen]

    def _augment(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        flipped = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
        padded = F.pad(flipped, [self.shift] * 4, mode="reflect")
        tops, lefts = torch.randint(0, 2 * self.shift + 1, (2, count)).tolist()
        return torch.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, top, left in zip(padded, tops, lefts, strict=True)
            ]
        )


def measure(
    network: real.RealNetwork, recipe: fxquant.Recipe, images: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row before the training and one after it."""
    torch.manual_seed(0)
    model = network.load()
    q = fxquant.compile(model, recipe, calibration=network.calibration_batches(images))
    rows = [_row(network, recipe, "post-training", q, 0.0, model)]
    batches = list(network.calibration_batches(None, 100))
    data = Augmented(
        torch.cat([batch for batch, _ in batches]),
        torch.cat([labels for _, labels in batches]),
        options.pop("batch_size"),
        options.pop("shift"),
    )
    start = time.process_time()  # other work on the machine does not count
    trained = finetune(q, data, progress=True, **options)
    seconds = time.process_time() - start
    return [*rows, _row(network, recipe, "finetuned", trained, seconds, model)]


def _row(
    network: real.RealNetwork,
    recipe: fxquant.Recipe,
    name: str,
    q: fxquant.CompiledModel,
    seconds: float,
    model: Any,
) -> dict[str, Any]:
    found = evaluate(q, network.validation_batches(None, 100), reference=model)
    row = {
        "network": network.name,
        "recipe": recipe.name
        + (f", {len(recipe.overrides)} overrides" if recipe.overrides else ""),
        "bits": f"W{recipe.weights.bits}A{recipe.activations.bits}",
        "model": name,
        "top1": found.top1,
        "drop": found.top1_drop,
        "loss": found.loss,
        "agreement": found.agreement,
        "cpu_seconds": seconds,
        "note": q.report.notes[-1] if q.report.notes else "",
    }
    print(tabulate([row], headers="keys", floatfmt=".4f"), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "name", nargs="?", default="cifar_resnet20", metavar="NAME", type=one_of(real.NETWORKS)
    )
    parser.add_argument("--recipe", default="w4a4_head_stem8")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=250, help="images for the calibration")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--shift", type=int, default=4, help="largest random shift in pixels")
    parser.add_argument("--distillation", type=float, default=1.0)
    parser.add_argument("--no-teacher", action="store_true")
    parser.add_argument("--teacher-only", action="store_true", help="no labels")
    parser.add_argument("--observers", action="store_true", help="moving observers, not LSQ")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe = fxquant.Recipe.named(arguments.recipe)
    if arguments.set:
        recipe = recipe.replace(dict(map(fxquant.Recipe.parse_assignment, arguments.set)))
    options: dict[str, Any] = {
        "epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "batch_size": arguments.batch_size,
        "shift": arguments.shift,
        "distillation": arguments.distillation,
        "learn_steps": not arguments.observers,
    }
    if arguments.no_teacher:
        options["teacher"] = None
    if arguments.teacher_only:
        options["loss"] = None
    rows = measure(real.NETWORKS[arguments.name], recipe, arguments.images, options)
    print(tabulate(rows, headers="keys", floatfmt=".4f"))
    if arguments.write:
        print(results.write(f"qat-{arguments.name}-{arguments.recipe}", rows))


if __name__ == "__main__":
    main()
