"""The studies of `fxquant sweep`, run on the real networks.

    python -m benchmarks.studies cifar_resnet20 fusion observers [--checkpoint DIR] [--write]

Rows of learned rounding say of `--set` how many iterations they took. A run that is interrupted
goes on behind its last finished row where `--checkpoint` names a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fxquant
from benchmarks import real, results
from benchmarks.names import one_of
from fxquant.measure.studies import STUDIES
from fxquant.measure.sweep import sweep


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=sorted(real.NETWORKS))
    parser.add_argument("studies", nargs="+", type=one_of(STUDIES), metavar="STUDY")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--write", action="store_true")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    network = real.NETWORKS[arguments.name]
    changes = dict(fxquant.Recipe.parse_assignment(text) for text in arguments.set)
    recipe = fxquant.Recipe.named(arguments.recipe).replace(changes)
    calibration = network.calibration_batches(arguments.images)
    validation = network.validation_batches()
    images = {
        "calibration": results.digest(calibration),
        "validation": results.digest(validation),
    }
    for study in arguments.studies:
        folder = arguments.checkpoint and arguments.checkpoint / arguments.name / study
        found = sweep(
            study,
            network.load(),
            recipe,
            calibration=calibration,
            evaluation=validation,
            checkpoint=folder,
            progress=True,
        )
        print(found, flush=True)
        if arguments.write:
            name = f"study-{arguments.name}-{study}"
            results.write(name, found.to_json(), images=images)


if __name__ == "__main__":
    main()
