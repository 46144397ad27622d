"""The commands that help to choose a recipe: recipes, sensitivity, blocks."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

import fxquant
from fxquant.cli import options
from fxquant.cli.argument_types import size
from fxquant.cli.outcome import Outcome
from fxquant.errors import CalibrationError, FxquantError, InputError
from fxquant.frontend.models import list_models
from fxquant.measure.auto_bits import auto_recipe, choose_bits, weight_bytes
from fxquant.measure.pages import write_sensitivity
from fxquant.measure.sensitivity import Sensitivity
from fxquant.recipe import names as recipe_names
from fxquant.reconstruct import find_blocks, granularity
from passes import format_tree

AUTO = "auto"
_WIDTHS = (2, 3, 4, 8)
_LOW_BITS = "w4a8"


def add_sensitivity(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant sensitivity``."""
    options.add_model(parser)
    options.add_recipe(parser, default=_LOW_BITS, target=False)
    options.add_calibration(parser)
    group = parser.add_argument_group("sensitivity")
    _add_bits(group)
    group.add_argument(
        "--activations", action="store_true", help="measure each quantized value as well"
    )
    group.add_argument(
        "--plot", metavar="FILE", help="draw SQNR and KL over the layers, e.g. s.png or s.svg"
    )
    options.add_html(group)
    options.add_common(parser)


def run_sensitivity(arguments: argparse.Namespace) -> Outcome:
    """Quantize one layer at a time, on the calibration images; labels, if any, give the loss."""
    if arguments.html is not None:
        options.check_destination("--html", arguments.html)
    if arguments.plot is not None:
        options.check_destination("--plot", arguments.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                "--plot needs matplotlib: install it with pip install 'fxquant[plots]'"
            )
    recipe = options.open_recipe(arguments.recipe, arguments.set, arguments.images)
    found = _measure(arguments, recipe, activations=arguments.activations)
    data: dict[str, Any] = {"model": arguments.model} | found.to_json()
    texts = [str(found)]
    if arguments.plot is not None:
        found.plot(arguments.plot)
        texts.append(f"drew {arguments.plot}")
        data["plot"] = arguments.plot
    if arguments.html is not None:
        write_sensitivity(found, arguments.html, arguments.model)
        texts.append(f"wrote {arguments.html}")
        data["html"] = arguments.html
    return Outcome("\n".join(texts), data)


def add_blocks(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant blocks``."""
    options.add_model(parser)
    options.add_recipe(parser, default=f"{_LOW_BITS}_brecq", target=False)
    options.add_calibration(parser, default=options.RANDOM)
    options.add_common(parser)


def run_blocks(arguments: argparse.Namespace) -> Outcome:
    """The tree of what a recipe reconstructs; images only show the shape of the input."""
    recipe = options.open_recipe(arguments.recipe, arguments.set)
    nearest = recipe.replace({"reconstruction.method": "none"})
    arguments.images = 1
    fused = fxquant.compile(
        options.open_model(arguments),
        nearest,
        calibration=options.open_calibration(arguments, nearest),
        target="reference",
    ).stages["fused"]
    found = find_blocks(fused, recipe.reconstruction)
    data = {
        "model": arguments.model,
        "granularity": granularity(recipe.reconstruction),
        "blocks": [asdict(block) for block in found],
    }
    return Outcome(format_tree(found).rstrip(), data)


def add_models(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant models``."""
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        nargs="?",
        default="*",
        help="a part of the name, or a glob such as 'timm:resnet*' or 'vit_*'",
    )
    options.add_common(parser)


def run_models(arguments: argparse.Namespace) -> Outcome:
    """List what MODEL may be by name."""
    found = list_models(arguments.pattern)
    if not found:
        raise InputError(f"no model's name fits {arguments.pattern!r}; `fxquant models` lists all")
    return Outcome("\n".join(found), {"models": found})


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant recipes``."""
    parser.add_argument(
        "name",
        metavar="NAME|FILE",
        nargs="?",
        help=f"print this one as TOML; '{AUTO}' makes one for MODEL under a size budget",
    )
    options.add_model(parser, optional=True)
    group = parser.add_argument_group("recipe")
    options.add_set(group, target=False)
    group = parser.add_argument_group(
        f"fxquant recipes {AUTO} MODEL --calibration DIR",
        "Measures what each layer costs at each bit width, and prints the recipe whose widths "
        "harm least within the budget: a byte for a weight of more than 4 bits, else half a byte.",
    )
    group.add_argument(
        "--base",
        metavar="NAME|FILE",
        help=f"the recipe that gets other bit widths; default {_LOW_BITS}",
    )
    group.add_argument(
        "--size-budget",
        type=size,
        metavar="BYTES",
        help="of the weights of all layers; 250kB and 1.5MB will do",
    )
    group.add_argument(
        "--ratio", type=float, metavar="R", help="instead: times smaller than in float32, e.g. 6"
    )
    _add_bits(group)
    group.add_argument(
        "--objective",
        choices=("kl", "loss", "noise"),
        default="kl",
        help="what is summed over the layers: divergence of the prediction (default), "
        "increase of the loss, or noise of the output",
    )
    group.add_argument(
        "--storage",
        choices=("file", "bits"),
        default="file",
        help="count what fxquant's files take (default), or the bits themselves",
    )
    group.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="LAYER=BITS",
        help="a width that is given, e.g. fc=8; may be repeated",
    )
    group.add_argument(
        "--measured",
        metavar="FILE",
        help="what `fxquant sensitivity MODEL --json` printed, in place of measuring again",
    )
    options.add_calibration(parser)
    options.add_common(parser)


def run_recipes(arguments: argparse.Namespace) -> Outcome:
    """List the named recipes, print one with its changes as TOML, or make one."""
    if arguments.name == AUTO:
        return _run_auto(arguments)
    for option in ("model", "base", "size_budget", "ratio", "measured"):
        if getattr(arguments, option) is not None:
            named = option.upper() if option == "model" else f"--{option.replace('_', '-')}"
            raise InputError(f"{named} belongs to `fxquant recipes {AUTO} MODEL`")
    if arguments.name is None:
        known = recipe_names.describe()
        table = tabulate(known.items(), tablefmt="plain")
        return Outcome(f"{table}\n\n{recipe_names.grammar()}", known)
    recipe = options.open_recipe(arguments.name, arguments.set)
    toml = recipe.to_toml()
    return Outcome(toml.rstrip(), {"name": recipe.name, "toml": toml})


def _run_auto(arguments: argparse.Namespace) -> Outcome:
    if (arguments.size_budget is None) == (arguments.ratio is None):
        raise InputError(f"recipes {AUTO} needs a budget: give --size-budget BYTES or --ratio R")
    if arguments.model is None and arguments.measured is None:
        raise InputError(
            f"recipes {AUTO} needs a model: `fxquant recipes {AUTO} MODEL --calibration DIR`"
        )
    fixed = dict(map(_fixed, arguments.fix))
    recipe = options.open_recipe(arguments.base or _LOW_BITS, arguments.set, arguments.images)
    found = (
        _measure(arguments, recipe)
        if arguments.measured is None
        else _read_measured(arguments.measured)
    )
    bits = choose_bits(
        found,
        arguments.size_budget,
        ratio=arguments.ratio,
        objective=arguments.objective,
        storage=arguments.storage,
        fixed=fixed,
    )
    made = auto_recipe(recipe, bits)
    taken = weight_bytes(found, bits, storage=arguments.storage)
    full = sum(4 * next(iter(row.values())).values for row in found.of("weight").values())
    about = [
        f"Bit widths of {len(bits)} layers: {_counts(bits.values())}.",
        f"Their weights take {taken} bytes, {full / taken:.2f} times less than in float32.",
        f"Measured on {found.images} images, one layer at a time.",
    ]
    toml = "".join(f"# {line}\n" for line in about) + "\n" + made.to_toml()
    data = {
        "name": made.name,
        "toml": toml,
        "bits": bits,
        "weight_bytes": taken,
        "float_bytes": full,
        "images": found.images,
    }
    return Outcome(toml.rstrip(), data)


def _add_bits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--bits",
        type=int,
        nargs="+",
        default=_WIDTHS,
        metavar="N",
        help=f"bit widths to measure, 2 to 8; default {' '.join(map(str, _WIDTHS))}",
    )


def _measure(
    arguments: argparse.Namespace, recipe: fxquant.Recipe, *, activations: bool = False
) -> Sensitivity:
    if arguments.calibration is None:
        raise CalibrationError("the outputs are measured on images; add --calibration DIR")
    # Grids are what counts here; a rounding would be learned for nothing.
    nearest = recipe.replace({"reconstruction.method": "none"})
    batches = options.open_calibration(arguments, nearest)
    return fxquant.sensitivity(
        options.open_model(arguments),
        nearest,
        batches,
        bits=arguments.bits,
        activations=activations,
        progress=options.shows_progress(arguments),
    )


def _read_measured(path: str) -> Sensitivity:
    try:
        return Sensitivity.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise FxquantError(
            f"--measured {path}: is not what `fxquant sensitivity --json` prints ({error})"
        ) from error


def _fixed(text: str) -> tuple[str, int]:
    path, _, width = text.rpartition("=")
    if not path or not width.isdecimal():
        raise InputError(f"--fix {text}: is no LAYER=BITS, such as fc=8")
    return path, int(width)


def _counts(widths: Iterable[int]) -> str:
    found = Counter(widths)
    return ", ".join(f"{found[width]} with {width}" for width in sorted(found))
