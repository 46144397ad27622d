"""The options of an accuracy target: on which images layers are chosen for more bits."""

from __future__ import annotations

import argparse

from fxquant.cli import options
from fxquant.cli.argument_types import positive
from fxquant.data import ImageBatches, open_batches

__all__ = ["add_validation", "open_validation"]


def add_validation(parser: argparse.ArgumentParser) -> None:
    """``--validation`` and ``--validation-images``."""
    group = parser.add_argument_group(
        "accuracy target",
        "Where --max-drop is given, the layers that cost most get more bits until top-1 drops by "
        "no more than that on these images.",
    )
    group.add_argument(
        "--validation", metavar="DIR", help="labelled images; default those of the calibration"
    )
    group.add_argument(
        "--validation-images", type=positive, metavar="N", help="how many; default all"
    )


def open_validation(arguments: argparse.Namespace) -> ImageBatches | None:
    """The batches of `add_validation`, or None where no source is given."""
    if arguments.validation is None:
        return None
    return open_batches(
        arguments.validation,
        preprocessing=options.preprocessing(arguments),
        images=arguments.validation_images,
        select=arguments.select,
        batch_size=arguments.batch_size,
    )
