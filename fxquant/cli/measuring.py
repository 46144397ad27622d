"""The commands that measure: evaluate, sweep, quickstart."""

from __future__ import annotations

import argparse
from typing import Any

import fxquant
from fxquant.cli import options
from fxquant.cli.argument_types import positive
from fxquant.cli.outcome import Outcome, add_checks, failed_checks, wants_checks
from fxquant.cli.processes import joined
from fxquant.cli.quickstart.run import quickstart
from fxquant.compilation import check_device
from fxquant.data import ImageBatches
from fxquant.errors import CalibrationError, DataError, InputError, ModelError
from fxquant.frontend.models import load_model
from fxquant.measure.evaluate import evaluate
from fxquant.measure.pages import write_sweep
from fxquant.measure.studies import STUDIES
from fxquant.measure.sweep import Sweep, sweep
from fxquant.recipe import learned_methods


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant evaluate``."""
    options.add_model(parser, saved=True)
    parser.add_argument("evaluate", metavar="DIR", help="images to evaluate on")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--reference", metavar="MODEL", help="float model to compare with")
    group.add_argument("--reference-weights", metavar="FILE", help="safetensors file for it")
    group.add_argument(
        "--images", dest="evaluate_images", type=positive, metavar="N", help="default all"
    )
    options.add_target(group)
    options.add_images(parser)
    add_checks(parser)
    options.add_common(parser)
    parser.set_defaults(evaluate_preprocessing=None)


def run_evaluate(arguments: argparse.Namespace) -> Outcome:
    """Accuracy of one model, beside that of a float reference where one is given."""
    saved = options.is_artifact(arguments.model)
    if saved and arguments.weights:
        raise ModelError(
            f"{arguments.model} has its own weights; those of the float model to compare with are "
            "--reference-weights"
        )
    if wants_checks(arguments) and arguments.reference is None:
        raise InputError("the checks compare with float; add --reference MODEL")
    model: Any = (
        options.open_saved(arguments.model, arguments.target)
        if saved
        else options.open_model(arguments)
    )
    compiled = isinstance(model, fxquant.CompiledModel)
    known = model.report.provenance.preprocessing if compiled else None
    batches = options.open_evaluation(arguments, known)
    if not batches.labelled and arguments.reference is None:
        raise DataError(
            f"{arguments.evaluate}: the images have no labels; add labels.csv (file,label), "
            "put them into class folders, or give a --reference to compare with"
        )
    reference = arguments.reference and load_model(
        arguments.reference, arguments.reference_weights, classes=arguments.classes
    )
    result = evaluate(
        model, batches, reference=reference, progress=options.shows_progress(arguments)
    )
    notes = _other_images(model, batches) if compiled else []
    data = {"model": arguments.model} | result.to_json() | {"notes": notes}
    return Outcome("\n".join([str(result), *notes]), data, failed_checks(arguments, result))


def _other_images(model: fxquant.CompiledModel, batches: ImageBatches) -> list[str]:
    """What is to be said where the images differ from those of the calibration."""
    images, _ = next(iter(batches))
    notes = []
    found, wanted = images.shape[1:], model.example[0].shape[1:]
    if found != wanted:
        sizes = (" x ".join(map(str, shape)) for shape in (found, wanted))
        notes.append("note: the images are {}, those of the calibration were {}".format(*sizes))
    known = model.report.provenance.preprocessing
    if known is not None and batches.preprocessing != known:
        notes.append(f"note: the calibration's preprocessing was {known}")
    return notes


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant sweep``."""
    parser.add_argument("study", metavar="STUDY", choices=tuple(STUDIES), help=", ".join(STUDIES))
    options.add_model(parser)
    options.add_recipe(parser)
    options.add_calibration(parser)
    options.add_evaluation(parser, required=True)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="GLOB",
        help="run the rows of this name, e.g. 'W4A8, BN folded*'; may be repeated; default all",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="run the first N rows at most")
    group.add_argument(
        "--checkpoint", metavar="DIR", help="keep finished rows there, and go on behind them"
    )
    group = options.add_device(parser)
    group.add_argument(
        "--training",
        metavar="DIR",
        help="images that qat trains on, labelled or not; default those of the calibration",
    )
    group.add_argument(
        "--epochs", type=positive, default=10, metavar="N", help="of qat; default 10"
    )
    options.add_html(parser.add_argument_group("results"))
    options.add_common(parser)


def run_sweep(arguments: argparse.Namespace) -> Outcome:
    """Compile and measure one model with every setting of a study.

    Under torchrun every process measures its share of the rows; the first one prints them all.
    """
    check_device(arguments.device)
    if arguments.html is not None:
        options.check_destination("--html", arguments.html)
    with joined(arguments.device) as first:
        result = _sweep(arguments, progress=options.shows_progress(arguments) and first)
    if not first:
        return Outcome("", {}, silent=True)
    data = {"model": arguments.model} | result.to_json()
    if arguments.html is not None:
        write_sweep(result, arguments.html, arguments.model)
        data["html"] = arguments.html
    return Outcome(str(result), data)


def _sweep(arguments: argparse.Namespace, *, progress: bool) -> Sweep:
    recipe = options.open_recipe(arguments.recipe, arguments.set, arguments.images)
    model = options.open_model(arguments)
    learned = (
        {"reconstruction.method": arguments.study} if arguments.study in learned_methods() else {}
    )
    calibration = options.open_calibration(arguments, recipe.replace(learned))
    if calibration is None:
        raise CalibrationError("a sweep calibrates every setting; add --calibration DIR")
    training = options.open_training(arguments) if arguments.training else None
    return sweep(
        arguments.study,
        model,
        recipe,
        calibration=calibration,
        evaluation=options.open_evaluation(arguments),
        target=arguments.target,
        select=arguments.rows,
        limit=arguments.limit,
        training=training,
        epochs=arguments.epochs,
        device=arguments.device,
        checkpoint=arguments.checkpoint,
        progress=progress,
    )


def add_quickstart(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant quickstart``."""
    parser.add_argument("--diff", action="store_true", help="print the passes' diffs in full")
    options.add_common(parser)


def run_quickstart(arguments: argparse.Namespace) -> Outcome:
    """Compile the small network that comes along, and measure it."""
    result = quickstart(progress=options.shows_progress(arguments))
    return Outcome(result.text(full_diffs=arguments.diff), result.to_json())
