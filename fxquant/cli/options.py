"""Options that several commands share, and the objects that they stand for.

More than 300 lines, because what adds an option and what opens it stand side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends import available_targets
from fxquant.cli.argument_types import positive, shape
from fxquant.data import PREPROCESSINGS, ImageBatches, Preprocessing, open_batches
from fxquant.data.preprocessing import FIELD_READERS, INTERPOLATIONS
from fxquant.errors import InputError, ModelError
from fxquant.export.onnx import require_onnx
from fxquant.frontend.models import load_model
from fxquant.reconstruct import find_method

RANDOM = "random"
IMAGES = 250
RANDOM_IMAGES = 16
ARTIFACT_SUFFIX, ONNX_SUFFIX = ".fxq", ".onnx"

Batches = ImageBatches | Sequence[Tensor]


def add_common(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--quiet`` or ``--progress``, and ``--threads``."""
    group = parser.add_argument_group("output and machine")
    group.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else, to stdout"
    )
    shown = group.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="show no progress on stderr")
    shown.add_argument(
        "--progress", action="store_true", help="show it even where stderr is no terminal"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="threads inside an operator")


def shows_progress(arguments: argparse.Namespace) -> bool:
    """Whether to show bars: as the options say, else where someone looks at stderr."""
    return not arguments.quiet and (arguments.progress or sys.stderr.isatty())


def add_model(
    parser: argparse.ArgumentParser, *, saved: bool = False, optional: bool = False
) -> None:
    """MODEL, ``--weights`` and ``--classes``; where `saved`, MODEL may be a file."""
    kinds = "torchvision:NAME, timm:NAME or module.path:factory"
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help=f"{kinds}, or a saved .fxq or .onnx file" if saved else kinds,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--weights", metavar="FILE", help="safetensors file for the float model")
    group.add_argument("--classes", type=positive, metavar="N", help="num_classes of the model")


def add_recipe(
    parser: argparse.ArgumentParser, *, default: str = "w8a8", target: bool = True
) -> None:
    """``--recipe``, ``--set`` and, unless told otherwise, ``--target``."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        default=default,
        metavar="NAME|FILE",
        help=f"see `fxquant recipes`; default {default}",
    )
    add_set(group, target=target)


def add_set(group: argparse._ArgumentGroup, *, target: bool = True) -> None:
    """``--set`` and, unless told otherwise, ``--target``."""
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe, e.g. weights.bits=4 or reconstruction.iterations=500; may be "
        "repeated",
    )
    if target:
        add_target(group)


def add_target(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """``--target``; those that this machine lacks stand with the reason."""
    known = [f"{name} ({why})" if why else name for name, why in available_targets().items()]
    group.add_argument(
        "--target",
        default="x86",
        metavar="NAME",
        help=f"what runs it: {', '.join(known)}, or auto, the fastest here; default x86",
    )


def add_device(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """``--device``, and its group."""
    group = parser.add_argument_group("learned rounding and training")
    group.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (default), cuda or cuda:N"
    )
    return group


def add_calibration(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--calibration``, ``--images``, ``--input-shape`` and the options of `add_images`."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        default=default,
        metavar="DIR",
        help=f"'{RANDOM}' calibrates on noise, for measuring latency"
        + (f"; default {default}" if default else ""),
    )
    group.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help=f"how many; default {IMAGES}, or what the paper of a learned rounding takes",
    )
    group.add_argument(
        "--input-shape",
        type=shape,
        default=(3, 224, 224),
        metavar="C,H,W",
        help="of random images; default 3,224,224",
    )
    add_images(parser)


def add_images(parser: argparse.ArgumentParser) -> None:
    """How images are chosen, batched and preprocessed."""
    group = parser.add_argument_group(
        "images",
        "DIR holds class folders, or labels.csv (file,label), or is an .npz archive (images, "
        "labels). PREPROCESSING is a name with changes, as in imagenet,resize=160,crop=160; "
        f"names: {', '.join(PREPROCESSINGS)}.",
    )
    group.add_argument(
        "--preprocessing", help="default imagenet, or what a saved file was calibrated with"
    )
    group.add_argument("--resize", metavar="N", help="of the shorter side, or 'none'")
    group.add_argument("--crop", metavar="N", help="of the center, or 'none'")
    group.add_argument("--interpolation", choices=tuple(INTERPOLATIONS))
    group.add_argument("--mean", metavar="R:G:B", help="of values in [0, 1]")
    group.add_argument("--std", metavar="R:G:B")
    group.add_argument(
        "--select",
        choices=("spread", "first"),
        default="spread",
        help="take the images evenly over all names (default), or the first ones",
    )
    group.add_argument("--batch-size", type=positive, default=25, metavar="N", help="default 25")


def add_evaluation(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--evaluate``, ``--evaluate-images`` and ``--evaluate-preprocessing``."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", required=required, metavar="DIR", help="images to evaluate on")
    group.add_argument(
        "--evaluate-images", type=positive, metavar="N", help="how many; default all"
    )
    group.add_argument(
        "--evaluate-preprocessing",
        metavar="PREPROCESSING",
        help="where it differs from that of the calibration images",
    )


def open_model(arguments: argparse.Namespace) -> nn.Module:
    """The float model of `add_model`."""
    return load_model(arguments.model, arguments.weights, classes=arguments.classes)


def is_artifact(spelling: str) -> bool:
    """Whether `spelling` is a saved file and not a model's name."""
    return spelling.endswith((ARTIFACT_SUFFIX, ONNX_SUFFIX)) or Path(spelling).is_file()


def open_artifact(path: str, target: str) -> fxquant.CompiledModel:
    """The compiled model of a file."""
    if not Path(path).is_file():
        raise ModelError(f"{path}: there is no such file")
    return fxquant.load(path, target=target)


def open_saved(path: str, target: str) -> nn.Module:
    """What a file holds: a compiled model, or an ONNX network in ONNX Runtime."""
    return open_onnx(path) if path.endswith(ONNX_SUFFIX) else open_artifact(path, target)


def open_onnx(path: str) -> nn.Module:
    """An ONNX file as a module that runs in ONNX Runtime."""
    require_onnx()
    from fxquant.export.onnx.network import OnnxNetwork

    if not Path(path).is_file():
        raise ModelError(f"{path}: there is no such file")
    return OnnxNetwork(path)


def open_recipe(name: str, changes: Sequence[str], images: int | None = None) -> fxquant.Recipe:
    """A named recipe or a TOML file, with changes ``KEY=VALUE`` as ``--set`` takes them.

    `images`, where given, overrules how many calibration images the recipe wants at most.
    """
    recipe = (
        fxquant.Recipe.from_toml(Path(name))
        if name.endswith(".toml")
        else fxquant.Recipe.named(name)
    )
    values = dict(map(fxquant.Recipe.parse_assignment, changes))
    if images is not None and recipe.calibration.images:
        values["calibration.images"] = images
    return recipe.replace(values)


def open_calibration(arguments: argparse.Namespace, recipe: fxquant.Recipe) -> Batches | None:
    """The batches of `add_calibration`, or None where no source is given.

    A recipe that observes no values needs none: noise then only shows the shape of the input.
    """
    if arguments.calibration is None:
        if _observes_values(recipe) or recipe.calibration.source:
            return None
        return random_batches(1, 1, arguments.input_shape)
    if arguments.calibration == RANDOM:
        return random_batches(
            arguments.images or RANDOM_IMAGES, arguments.batch_size, arguments.input_shape
        )
    return open_batches(
        arguments.calibration,
        preprocessing=preprocessing(arguments),
        images=arguments.images or recipe.calibration.images or _default_images(recipe),
        select=arguments.select,
        batch_size=arguments.batch_size,
    )


def open_evaluation(
    arguments: argparse.Namespace, default: Preprocessing | None = None
) -> ImageBatches:
    """The batches of `add_evaluation`, whose source must be given."""
    named = arguments.evaluate_preprocessing
    return open_batches(
        arguments.evaluate,
        preprocessing=preprocessing(arguments, default) if named is None else named,
        images=arguments.evaluate_images,
        select=arguments.select,
        batch_size=arguments.batch_size,
    )


def open_training(arguments: argparse.Namespace) -> ImageBatches:
    """The batches of ``--training``."""
    return open_batches(
        arguments.training,
        preprocessing=preprocessing(arguments),
        batch_size=arguments.batch_size,
    )


def random_batches(images: int, batch_size: int, size: Sequence[int]) -> list[Tensor]:
    """Seeded normal noise f32[N,*size], in batches."""
    random = torch.Generator().manual_seed(0)
    return list(torch.split(torch.randn(images, *size, generator=random), batch_size))


def _observes_values(recipe: fxquant.Recipe) -> bool:
    weights_only = recipe.activations.bits == "float" and not recipe.overrides
    rounds = recipe.reconstruction.method != "none"
    moves = bool(recipe.split_outliers or recipe.smooth_quant or recipe.reparameterize)
    return recipe.bias_correction or rounds or moves or not (recipe.dynamic or weights_only)


def _default_images(recipe: fxquant.Recipe) -> int:
    settings = recipe.reconstruction
    if not settings.learned:
        return IMAGES
    return settings.images or find_method(settings.method).published.images


def preprocessing(
    arguments: argparse.Namespace, default: Preprocessing | None = None
) -> Preprocessing:
    """What the options of `add_images` do with each image; they change `default`, if any."""
    named = (
        Preprocessing.parse(arguments.preprocessing or "imagenet")
        if arguments.preprocessing or default is None
        else default
    )
    given = {name: getattr(arguments, name) for name in FIELD_READERS}
    return named.replace({name: text for name, text in given.items() if text is not None})


def add_html(group: argparse._ArgumentGroup) -> None:
    """``--html``."""
    group.add_argument(
        "--html", metavar="FILE", help="write a page to look at: one file that reads nothing else"
    )


def check_destination(option: str, path: str) -> None:
    """Raise InputError if the folder of `path` is missing: before minutes of work, not after."""
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {Path(path).absolute().parent}")
