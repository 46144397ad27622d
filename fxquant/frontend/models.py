"""Float models by name: ``torchvision:NAME``, ``timm:NAME`` or ``module.path:factory``.

Weights are read from safetensors files only: loading one runs no code from it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxquant.arguments import checked
from fxquant.errors import ModelError, nearest

TORCHVISION = "torchvision"
TIMM = "timm"
UNUSED_IN_EVAL = "num_batches_tracked"


@checked(spelling=ModelError, weights=ModelError, classes=ModelError)
def load_model(
    spelling: str, weights: str | Path | None = None, *, classes: int | None = None
) -> nn.Module:
    """The model that `spelling` names, in eval mode.

    Args:
        spelling: ``torchvision:NAME`` or ``timm:NAME`` (random weights, always the same), or
            ``module.path:factory``, where factory is called without arguments or is a module;
            modules are also looked for in the working directory.
        weights: a safetensors file for the model; see `load_weights`.
        classes: handed to the factory as ``num_classes``.

    Raises:
        ModelError: no such model, the factory fails or gives no module, or the weights do not fit.
    """
    package, separator, name = spelling.partition(":")
    if not separator or not package or not name:
        raise ModelError(
            f"{spelling!r} names no model; write torchvision:NAME, timm:NAME or module.path:factory"
        )
    arguments = {} if classes is None else {"num_classes": classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if package == TORCHVISION:
            model = _torchvision(name, arguments)
        elif package == TIMM:
            model = _timm(name, arguments)
        else:
            model = _from_factory(package, name, arguments)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of a safetensors file into `model`; every tensor must have its place.

    Tensors stored in another floating-point type (float16 on disk) are cast to the model's.

    Raises:
        ModelError: the file cannot be read; a key is missing or unexpected; a shape differs.
    """
    tensors = _read(Path(path))
    if tensors and all(key.startswith("module.") for key in tensors):
        # DataParallel puts this before each key that it saves.
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    wanted = model.state_dict()
    _check_keys(str(path), tensors, wanted)
    _check_tensors(str(path), tensors, wanted)
    model.load_state_dict(tensors, strict=False)


def list_models(pattern: str = "*") -> list[str]:
    """The names of torchvision's models, and of timm's where it is installed, that fit a glob.

    A pattern without a wildcard fits what holds it.
    """
    from torchvision import models

    names = [f"{TORCHVISION}:{name}" for name in models.list_models(exclude="quantized_*")]
    if importlib.util.find_spec(TIMM) is not None:
        names += [f"{TIMM}:{name}" for name in importlib.import_module(TIMM).list_models()]
    wild = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return [
        name
        for name in names
        if fnmatchcase(name, wild) or fnmatchcase(name.partition(":")[2], wild)
    ]


def _timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module(TIMM)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{TIMM}:{name} needs the package timm: install it with pip install timm"
        ) from error
    if not timm.is_model(name):
        known = timm.list_models()
        raise ModelError(
            f"timm has no model {name!r}{nearest(name, known) or '; see `fxquant models timm:`'}"
        )
    return _call(f"{TIMM}:{name}", partial(timm.create_model, name, pretrained=False), arguments)


def _torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise ModelError(
            f"torchvision has no model {name!r}{nearest(name, known) or '; see list_models()'}"
        )
    with warnings.catch_warnings():
        # Some factories warn that their random initialization will change.
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = models.get_model(name, weights=None, **_offline(name), **arguments)
    return model


def _offline(name: str) -> dict[str, None]:
    """Detection and segmentation models download a backbone unless they are told not to."""
    from torchvision import models

    parameters = inspect.signature(models.get_model_builder(name)).parameters
    return {"weights_backbone": None} if "weights_backbone" in parameters else {}


def _from_factory(package: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{package}.".startswith(f"{error.name}."):
            raise ModelError(
                f"{package} cannot be imported: it needs the module {error.name!r}"
            ) from error
        raise ModelError(
            f"there is no module {error.name!r} to take {package}:{name} from; modules are looked "
            "for in the working directory and in the environment"
        ) from error
    except Exception as error:
        raise ModelError(
            f"{package} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            offered = [each for each in vars(found) if not each.startswith("_")]
            raise ModelError(f"{package} has no {name!r}{nearest(part, offered)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ModelError(
            f"{package}:{name} is a {type(found).__name__}; expected a function that returns "
            "a torch.nn.Module"
        )
    return _call(f"{package}:{name}", found, arguments)


def _call(spelling: str, factory: Any, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model = factory(**arguments)
    except Exception as error:
        raise ModelError(f"{spelling} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spelling} returned a {type(model).__name__}; expected a torch.nn.Module"
        )
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such weights file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as safetensors ({error}); convert the weights with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error


def _check_keys(path: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in tensors and not key.endswith(UNUSED_IN_EVAL)]
    unexpected = [key for key in tensors if key not in wanted]
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(wanted)} keys missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} keys that the model does not have ({_some(unexpected)})")
    raise ModelError(
        f"{path} does not fit the model: {' and '.join(parts)}; is it another network's?"
    )


def _check_tensors(path: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} is {list(tensor.shape)} where the model has {list(wanted[key].shape)}"
        for key, tensor in tensors.items()
        if tensor.shape != wanted[key].shape
    ]
    if wrong:
        raise ModelError(
            f"{path} does not fit the model: {_some(wrong)}; "
            "for another number of classes hand it over (--classes N)"
        )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() != wanted[key].is_floating_point():
            raise ModelError(
                f"{path}: {key} is {tensor.dtype} where the model has {wanted[key].dtype}; "
                "expected a float network's weights"
            )


def _some(items: Sequence[str], most: int = 3) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
