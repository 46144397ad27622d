"""The commands that measure: bench, evaluate, sweep, quickstart.

More than 300 lines, because each has its options and its run beside each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import fxquant
from fxquant.cli import options
from fxquant.cli.argument_types import peer_names, positive
from fxquant.cli.outcome import Outcome, add_checks, failed_checks, wants_checks
from fxquant.cli.processes import joined
from fxquant.cli.quickstart.run import quickstart
from fxquant.compilation import check_device
from fxquant.convert import DTYPES
from fxquant.data import ImageBatches
from fxquant.errors import CalibrationError, DataError, InputError, ModelError
from fxquant.frontend.models import load_model
from fxquant.measure.benchmark import Benchmark, benchmark
from fxquant.measure.evaluate import evaluate
from fxquant.measure.pages import write_sweep
from fxquant.measure.peers import PEERS, peers, versions
from fxquant.measure.profile import profile
from fxquant.measure.studies import STUDIES
from fxquant.measure.sweep import Sweep, sweep
from fxquant.recipe import learned_methods


def add_bench(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant bench``."""
    options.add_model(parser, saved=True)
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        action="append",
        metavar="NAME|FILE",
        help="compile each float model with it; may be repeated; default w8a8",
    )
    options.add_set(group)
    options.add_calibration(parser, default=options.RANDOM)
    group = parser.add_argument_group("timing")
    group.add_argument(
        "--onnx",
        action="append",
        default=[],
        metavar="FILE",
        help="time this file in ONNX Runtime beside them; may be repeated",
    )
    group.add_argument("--batch", type=positive, default=1, metavar="N", help="default 1")
    group.add_argument(
        "--rounds", type=positive, default=20, metavar="N", help="turns of each; default 20"
    )
    group.add_argument(
        "--calls", type=positive, default=5, metavar="N", help="calls a turn; default 5"
    )
    group.add_argument(
        "--min-speedup",
        type=float,
        metavar="X",
        help="exit with 1 if the last one is not X times as fast as the first",
    )
    group.add_argument(
        "--convert",
        action="append",
        default=[],
        choices=tuple(DTYPES),
        help="the float model in this type beside; may be repeated",
    )
    group.add_argument(
        "--peers",
        type=peer_names,
        default=(),
        metavar="A,B",
        help=f"other tools' int8 beside: {', '.join(PEERS)}; they need fxquant[peers]",
    )
    group.add_argument(
        "--profile",
        action="store_true",
        help="also the time of each layer and what bounds it; needs --target native",
    )
    options.add_common(parser)


def run_bench(arguments: argparse.Namespace) -> Outcome:
    """Time a float model and what the recipes make of it, or a saved file, in turns."""
    recipes = [
        options.open_recipe(name, arguments.set, arguments.images)
        for name in arguments.recipe or ["w8a8"]
    ]
    candidates: dict[str, Any] = {}
    if options.is_artifact(arguments.model):
        if arguments.convert:
            raise InputError("--convert takes a float model: name one in place of a saved file")
        candidates[arguments.model] = options.open_saved(arguments.model, arguments.target)
    else:
        model = candidates["float"] = options.open_model(arguments)
        for recipe in recipes:
            candidates[recipe.name] = fxquant.compile(
                model,
                recipe,
                calibration=options.open_calibration(arguments, recipe),
                target=arguments.target,
                progress=options.shows_progress(arguments),
            )
        for dtype in arguments.convert:
            # Batch norms are folded there: that is the fastest float of it.
            candidates[dtype] = fxquant.convert(candidates[recipes[0].name], dtype)
    candidates |= {path: options.open_onnx(path) for path in arguments.onnx}
    (images,) = options.random_batches(arguments.batch, arguments.batch, arguments.input_shape)
    found, refused = _peers(arguments)
    candidates |= found
    profiles = {
        name: profile(candidate, images)
        for name, candidate in candidates.items()
        if arguments.profile and isinstance(candidate, fxquant.CompiledModel)
    }
    result = benchmark(
        candidates,
        images,
        rounds=arguments.rounds,
        calls=arguments.calls,
        progress=options.shows_progress(arguments),
    )
    data = result.to_json() | {"input_shape": list(images.shape)}
    if profiles:
        data["profiles"] = {name: found.to_json() for name, found in profiles.items()}
    text = f"{result}\ninput {list(images.shape)}"
    if arguments.peers:
        data |= {"peers": versions(arguments.peers), "refused": refused}
        text = "\n".join([text, *(f"without {name}: {why}" for name, why in refused.items())])
    text = "\n\n".join([text, *(f"{name}\n{found}" for name, found in profiles.items())])
    return Outcome(text, data, _too_slow(result, arguments.min_speedup))


def _peers(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    if not arguments.peers:
        return {}, {}
    if options.is_artifact(arguments.model):
        raise InputError("--peers quantize a float model: name one in place of a saved file")
    # Random images as for latency: ranges do not change how long a kernel takes.
    images = 4 * arguments.batch
    batches = options.random_batches(images, arguments.batch, arguments.input_shape)
    threads = torch.get_num_threads()
    return peers(options.open_model(arguments), batches, threads, arguments.peers)


def _too_slow(result: Benchmark, least: float | None) -> tuple[str, ...]:
    last = result.timings[-1]
    if least is None or 1 / last.ratio >= least:
        return ()
    return (f"{last.name} is {1 / last.ratio:.2f} times as fast as {result.timings[0].name}",)


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
