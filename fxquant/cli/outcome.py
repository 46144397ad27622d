"""What a command returns, and the checks that decide its exit code."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxquant.cli.argument_types import points, share
from fxquant.errors import DataError
from fxquant.measure.evaluate import Evaluation
from fxquant.measure.tables import decibels, percent


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        text: for people; printed unless ``--json`` is given.
        data: for programs; printed as JSON where it is.
        failures: the checks that failed; none means exit code 0.
        silent: print nothing: another process does.
    """

    text: str
    data: Mapping[str, Any]
    failures: tuple[str, ...] = field(default=())
    silent: bool = False


def add_checks(
    parser: argparse.ArgumentParser, *, drop: str = "of top-1 against float, e.g. 0.5"
) -> None:
    """``--min-agreement``, ``--min-sqnr`` and ``--max-drop``, whose help is `drop`."""
    group = parser.add_argument_group("checks (exit code 1 where one fails)")
    group.add_argument("--min-agreement", type=share, metavar="SHARE", help="e.g. 0.95")
    group.add_argument("--min-sqnr", type=float, metavar="DB", help="of the logits, e.g. 17.4")
    group.add_argument("--max-drop", type=points, metavar="POINTS", help=drop)


def wants_checks(arguments: argparse.Namespace, *, besides: str = "") -> bool:
    """Whether any option of `add_checks` is given, the one that is named aside."""
    options = ("min_agreement", "min_sqnr", "max_drop")
    return any(getattr(arguments, name) is not None for name in options if name != besides)


def failed_checks(arguments: argparse.Namespace, evaluation: Evaluation) -> tuple[str, ...]:
    """One line for each check of `add_checks` that `evaluation` does not pass.

    Raises:
        DataError: a check needs a figure that the images cannot give.
    """
    agreement, sqnr, drop = evaluation.agreement, evaluation.sqnr_db, evaluation.top1_drop
    failures = []
    least = arguments.min_agreement
    if least is not None and not (agreement is not None and agreement >= least):
        failures.append(f"agreement is {percent(agreement)}, below {percent(least)}")
    least = arguments.min_sqnr
    if least is not None and not (sqnr is not None and sqnr >= least):
        failures.append(f"SQNR is {decibels(sqnr)}, below {decibels(least)}")
    most = arguments.max_drop
    if most is not None and drop is None:
        raise DataError("--max-drop needs labels; the images have none")
    if most is not None and drop is not None and 100 * drop > most:
        failures.append(f"top-1 drops by {percent(drop)}, over {most:.2f} %")
    return tuple(failures)
