"""The command that times, and says what accuracy the time is paid with: bench."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch

import fxquant
from fxquant.cli import options
from fxquant.cli.argument_types import peer_names, positive
from fxquant.cli.outcome import Outcome
from fxquant.convert import DTYPES
from fxquant.errors import InputError
from fxquant.measure.benchmark import Benchmark, benchmark
from fxquant.measure.evaluate import Evaluation, collect_logits, evaluate
from fxquant.measure.peers import PEERS, peers, versions
from fxquant.measure.profile import profile
from fxquant.measure.tables import decibels, percent, table


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
    options.add_evaluation(parser)
    group = parser.add_argument_group("profile")
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
    random = arguments.calibration == options.RANDOM and not options.is_artifact(arguments.model)
    if arguments.evaluate and random:
        raise InputError("accuracy needs real ranges: add --calibration DIR to --evaluate")
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
    accuracies = _accuracies(arguments, candidates) if arguments.evaluate else {}
    (images,) = options.random_batches(arguments.batch, arguments.batch, arguments.input_shape)
    found, refused = _peers(arguments)
    candidates |= found
    profiles = {
        name: profile(candidate, images)
        for name, candidate in candidates.items()
        if arguments.profile and _is_compiled(candidate)
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
    if accuracies:
        data["accuracy"] = {name: found.to_json() for name, found in accuracies.items()}
        text += f"\n\n{_accuracy_table(accuracies)}"
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


def _accuracies(
    arguments: argparse.Namespace, candidates: Mapping[str, Any]
) -> dict[str, Evaluation]:
    """What each reaches on the same images, compared with the first."""
    first = next(iter(candidates.values()))
    known = first.report.provenance.preprocessing if _is_compiled(first) else None
    batches = options.open_evaluation(arguments, known)
    progress = options.shows_progress(arguments)
    logits = collect_logits(first, batches, progress=progress)
    return {
        name: evaluate(
            candidate,
            batches,
            reference=logits,
            progress=progress,
        )
        for name, candidate in candidates.items()
    }


def _accuracy_table(accuracies: Mapping[str, Evaluation]) -> str:
    rows = [
        (name, found.images, *map(percent, (found.top1, found.agreement)), decibels(found.sqnr_db))
        for name, found in accuracies.items()
    ]
    return table(rows, ("", "images", "top-1", "agreement", "SQNR"))


def _is_compiled(candidate: Any) -> bool:
    return isinstance(candidate, fxquant.CompiledModel)


def _too_slow(result: Benchmark, least: float | None) -> tuple[str, ...]:
    last = result.timings[-1]
    if least is None or 1 / last.ratio >= least:
        return ()
    return (f"{last.name} is {1 / last.ratio:.2f} times as fast as {result.timings[0].name}",)
