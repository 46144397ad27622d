"""The commands that compile and those that show it: compile, compare, inspect."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fxquant
from fxquant.cli import options
from fxquant.cli.argument_types import positive
from fxquant.cli.outcome import Outcome, add_checks, failed_checks, wants_checks
from fxquant.cli.processes import joined
from fxquant.cli.validation import accuracy_target, add_validation, open_validation
from fxquant.compilation import check_request
from fxquant.data import ImageBatches
from fxquant.errors import AccuracyError, ArtifactError, CalibrationError, DataError, InputError
from fxquant.measure.evaluate import collect_logits, evaluate
from fxquant.measure.pages import accuracy_section, comparison_section, latency_section
from fxquant.metrics import logits_of
from fxquant.report.sizes import written
from passes.infra.listing import to_text


def add_compile(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant compile``."""
    options.add_model(parser)
    options.add_recipe(parser)
    options.add_calibration(parser)
    options.add_evaluation(parser)
    add_validation(parser)
    add_checks(parser, drop="of top-1 against float, e.g. 0.5: raise layers until it holds")
    group = parser.add_argument_group("results")
    group.add_argument("--save", metavar="FILE", help="write the compiled model, e.g. m.fxq")
    group.add_argument(
        "--diff", action="store_true", help="print the diff of every pass that changed something"
    )
    group.add_argument(
        "--diff-pass",
        action="append",
        default=[],
        metavar="NAME",
        help="print the diff of this pass; may be repeated",
    )
    group.add_argument(
        "--dump", metavar="DIR", help="write every stage as text, JSON and Graphviz DOT"
    )
    options.add_html(group)
    group = options.add_device(parser)
    group.add_argument(
        "--checkpoint", metavar="FILE", help="write what is learned to it after each block"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on behind the blocks that --checkpoint holds, to the same bits",
    )
    options.add_common(parser)


def run_compile(arguments: argparse.Namespace) -> Outcome:
    """Compile; then, as far as asked for, evaluate beside float and save.

    Under torchrun the processes share the learning; the first one does the rest.
    """
    if wants_checks(arguments, besides="max_drop") and arguments.evaluate is None:
        raise InputError("the checks need images to evaluate on; add --evaluate DIR")
    for name in ("validation", "confidence"):
        if getattr(arguments, name) is not None and arguments.max_drop is None:
            raise InputError(f"--{name} belongs to --max-drop POINTS")
    if arguments.save is not None:
        options.check_destination("--save", arguments.save)
    if arguments.html is not None:
        options.check_destination("--html", arguments.html)
    recipe = options.open_recipe(arguments.recipe, arguments.set, arguments.images)
    if arguments.checkpoint is not None:
        options.check_destination("--checkpoint", arguments.checkpoint)
    accuracy_target(arguments)
    # Here too, because what comes before the compile takes a while.
    check_request(
        recipe,
        arguments.target,
        diff_passes=arguments.diff_pass,
        device=arguments.device,
        checkpoint=arguments.checkpoint,
        resume=arguments.resume,
    )
    with joined(arguments.device) as first:
        return _compile(arguments, recipe, first)


def _compile(arguments: argparse.Namespace, recipe: fxquant.Recipe, first: bool) -> Outcome:
    model = options.open_model(arguments)
    calibration = options.open_calibration(arguments, recipe)
    evaluation = options.open_evaluation(arguments) if arguments.evaluate and first else None
    progress = options.shows_progress(arguments) and first
    # The float side goes first: what is wrong with the images shows before the long part.
    reference = None if evaluation is None else _float_logits(model, evaluation, progress)
    missed: tuple[str, ...] = ()
    try:
        compiled = fxquant.compile(
            model,
            recipe,
            calibration=calibration,
            target=arguments.target,
            verbose=arguments.diff and first,
            diff_passes=tuple(arguments.diff_pass) if first else (),
            dump=Path(arguments.dump) if arguments.dump is not None and first else None,
            progress=progress,
            device=arguments.device,
            checkpoint=arguments.checkpoint,
            resume=arguments.resume,
            accuracy_target=accuracy_target(arguments),
            validation=open_validation(arguments),
        )
    except AccuracyError as error:
        compiled, missed = error.best, (str(error),)
    origin = replace(compiled.report.provenance, command=shlex.join(["fxquant", *arguments.words]))
    compiled.report = replace(compiled.report, provenance=origin)
    if not first:
        return Outcome("", {}, silent=True)
    texts = [str(compiled.report)]
    data: dict[str, Any] = {
        "model": arguments.model,
        "recipe": recipe.name,
        "target": arguments.target,
        "report": compiled.report.to_json(),
    }
    failures, pair = missed, None
    if evaluation is not None:
        pair = evaluate(compiled, evaluation, reference=reference, progress=progress)
        texts.append(str(pair))
        data["evaluation"] = pair.to_json()
        failures += failed_checks(arguments, pair)
    if arguments.save:
        compiled.save(Path(arguments.save))
        size = Path(arguments.save).stat().st_size
        texts.append(f"saved {arguments.save}, {written(size)}")
        data["saved"] = {"file": arguments.save, "bytes": size}
    if arguments.html:
        measured = [latency_section(compiled)]
        if pair is not None:
            measured.append(accuracy_section(pair, evaluation))
        compiled.report.to_html(arguments.html, measured=measured)
        texts.append(f"wrote {arguments.html}")
        data["html"] = arguments.html
    return Outcome("\n\n".join(texts), data, failures)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant compare``."""
    options.add_model(parser)
    options.add_recipe(parser)
    options.add_calibration(parser)
    options.add_evaluation(parser)
    group = parser.add_argument_group("operations")
    group.add_argument(
        "--ops",
        action="store_true",
        help="replace one softmax, GELU, LayerNorm or residual form at a time, on all the images",
    )
    group.add_argument(
        "--worst", type=int, default=10, metavar="N", help="single values shown; default 10"
    )
    group.add_argument(
        "--value-images",
        type=positive,
        default=16,
        metavar="N",
        help="images that single values are measured on; default 16",
    )
    options.add_html(parser.add_argument_group("results"))
    options.add_common(parser)


def run_compare(arguments: argparse.Namespace) -> Outcome:
    """Compile, and compare each layer with float on one batch; or each operation on all.

    The images come from ``--evaluate``, or are those of the calibration.
    """
    if arguments.html is not None:
        if arguments.ops:
            raise InputError("--html shows the comparison of layers: leave out --ops")
        options.check_destination("--html", arguments.html)
    recipe = options.open_recipe(arguments.recipe, arguments.set, arguments.images)
    model = options.open_model(arguments)
    calibration = options.open_calibration(arguments, recipe)
    batches = options.open_evaluation(arguments) if arguments.evaluate else calibration
    if batches is None:
        raise DataError("there are no images to compare on; add --calibration DIR")
    if arguments.ops:
        if calibration is None and not recipe.calibration.source:
            raise CalibrationError("every form is calibrated; add --calibration DIR")
        costs = fxquant.compare_ops(
            model,
            recipe,
            batches,
            calibration=calibration,
            worst=max(0, arguments.worst),
            value_images=arguments.value_images,
            progress=options.shows_progress(arguments),
        )
        return Outcome(str(costs), {"model": arguments.model} | costs.to_json())
    compiled = fxquant.compile(
        model,
        recipe,
        calibration=calibration,
        target=arguments.target,
        progress=options.shows_progress(arguments),
    )
    batch: Any = next(iter(batches))
    comparison = fxquant.compare(compiled, batch if isinstance(batch, Tensor) else batch[0])
    data = {"model": arguments.model, "recipe": recipe.name, "rows": comparison.to_json()}
    if arguments.html:
        compiled.report.to_html(arguments.html, measured=[comparison_section(comparison)])
        data["html"] = arguments.html
    return Outcome(str(comparison), data)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant inspect``."""
    parser.add_argument("file", metavar="FILE", help="a file that `fxquant compile --save` wrote")
    options.add_target(parser)
    parser.add_argument("--stage", metavar="NAME", help="print this stage's graph, e.g. integer")
    options.add_common(parser)


def run_inspect(arguments: argparse.Namespace) -> Outcome:
    """Load a file, which checks it, and say what is in it."""
    compiled = options.open_artifact(arguments.file, arguments.target)
    size = Path(arguments.file).stat().st_size
    report = compiled.report
    data: dict[str, Any] = {
        "file": arguments.file,
        "bytes": size,
        "provenance": report.provenance.to_json(),
        "recipe": compiled.recipe.name,
        "recipe_toml": compiled.recipe.to_toml(),
        "stages": list(compiled.stages),
        "report": compiled.report.to_json(),
    }
    inputs = ", ".join(
        f"{name}: {str(value.dtype).removeprefix('torch.')}[any, "
        f"{', '.join(map(str, value.shape[1:]))}]"
        for name, value in zip(compiled.input_names, compiled.example, strict=True)
        if isinstance(value, Tensor)
    )
    texts = [
        f"{arguments.file}: a compiled {report.model}, recipe {report.recipe}, "
        f"{written(size)}; takes {inputs}\n{report.provenance}\n"
        f"its golden pair holds on this machine; stages {', '.join(compiled.stages)}",
        str(report),
        compiled.recipe.to_toml().rstrip(),
    ]
    if arguments.stage is not None:
        if arguments.stage not in compiled.stages:
            raise ArtifactError(
                f"{arguments.file} has no stage {arguments.stage!r}; "
                f"it has {', '.join(compiled.stages)}"
            )
        graph = to_text(compiled.stages[arguments.stage])
        texts.append(graph)
        data["graph"] = graph.splitlines()
    return Outcome("\n\n".join(texts), data)


def _float_logits(model: nn.Module, batches: ImageBatches, progress: bool) -> list[Tensor]:
    images, _ = next(iter(batches))
    batches.images.check_labels(logits_of(model, images[:1]).shape[1])
    return collect_logits(model, batches, progress=progress)
