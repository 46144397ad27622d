"""The options of an accuracy target: on which images layers are chosen for more bits."""

from __future__ import annotations

import argparse

import fxquant
from fxquant.cli import options
from fxquant.cli.argument_types import positive, share
from fxquant.data import ImageBatches, open_batches

__all__ = ["accuracy_target", "add_validation", "open_validation"]


def add_validation(parser: argparse.ArgumentParser) -> None:
    """``--validation``, ``--validation-images`` and ``--confidence``."""
    group = parser.add_argument_group(
        "accuracy target",
        "Where --max-drop is given, the layers that cost most get more bits until top-1 drops by "
        "no more than that, with what chance on so many images may add.",
    )
    group.add_argument(
        "--validation", metavar="DIR", help="labelled images; default those of the calibration"
    )
    group.add_argument(
        "--validation-images", type=positive, metavar="N", help="how many; default all"
    )
    group.add_argument(
        "--confidence",
        type=share,
        metavar="SHARE",
        help=f"that the drop is no larger on other such images; default {fxquant.Drop.confidence}; "
        "0.5 takes the drop as it is measured",
    )


def accuracy_target(arguments: argparse.Namespace) -> fxquant.Drop | None:
    """What ``--max-drop`` and ``--confidence`` say, or None where there is no target."""
    if arguments.max_drop is None:
        return None
    given = {} if arguments.confidence is None else {"confidence": arguments.confidence}
    return fxquant.Drop(arguments.max_drop, **given)


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
