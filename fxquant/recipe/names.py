"""The names of recipes: a TOML file for each of some, and a grammar for the others."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from typing import Any

from fxquant.errors import RecipeError, nearest
from fxquant.recipe.methods import METHODS

__all__ = ["GRAMMAR", "describe", "file_names", "grammar", "resolve"]

_FILES = resources.files("fxquant.recipe") / "named"
_FORM = r"w([2-8])a([2-8]|16|32)(|_head_stem8|_first_last8)"
GRAMMAR = "w{2..8}a{2..8|16|32}[_head_stem8|_first_last8]"
"""The names that need no file, before the method."""


def file_names() -> tuple[str, ...]:
    """The names of all recipes that have a file, sorted."""
    files = (file.name for file in _FILES.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def describe() -> dict[str, str]:
    """Every name that has a file, with the sentence that the file opens with."""
    return {name: _first_sentence(_text(name)) for name in file_names()}


def grammar() -> str:
    """How the names of further recipes are made, as text of a few lines."""
    width = max(map(len, METHODS))
    return "\n".join(
        [
            "Others follow from their names:",
            f"  {GRAMMAR}[_METHOD]    as in w2a4_head_stem8_qdrop",
            "  NAME_METHOD, with a NAME from above    as in vit_w4a8_integer_gptq",
            "METHOD is how weights are rounded; without one, to nearest:",
            *(f"  {name:{width}}  {method.meaning}" for name, method in METHODS.items()),
        ]
    )


def resolve(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a name stands for: the keys of a file, and changes by dotted path.

    Raises:
        RecipeError: it stands for nothing; says the nearest names.
    """
    base, method = name, ""
    for ending in METHODS:
        if name.endswith(f"_{ending}"):
            base, method = name.removesuffix(f"_{ending}"), ending
    found = _table_and_bits(base)
    if found is None:
        raise RecipeError(_unknown(name))
    table, changes = found
    if method:
        changes["reconstruction.method"] = method
    return table, changes


def _table_and_bits(name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The file of the same form, and the bits that its name asks for instead."""
    if name in file_names():
        return _table(name), {}
    form = re.fullmatch(_FORM, name)
    if form is None:
        return None
    weights, activations, kept = form.groups()
    table = _table(f"w4a4{kept}" if kept else "w4a8")
    bits: dict[str, Any] = {"weights.bits": int(weights)}
    if activations != "32":
        return table, {**bits, "activations.bits": int(activations)}
    # No override may quantize an activation where all stay float.
    kept_weights = [
        {key: value for key, value in override.items() if key not in ("activations", "inputs")}
        for override in table.get("overrides", [])
    ]
    return {**_table("w4a32"), "overrides": kept_weights}, bits


def _unknown(name: str) -> str:
    known = file_names()
    start = name.rpartition("_")[0]
    begun = start if _table_and_bits(start) is not None else ""
    offered = [*known, *(f"{begun}_{method}" for method in METHODS if begun)]
    return (
        f"unknown recipe {name!r}: known are {', '.join(known)} and {GRAMMAR}, each also with "
        f"{', '.join(f'_{method}' for method in METHODS)} behind it{nearest(name, offered)}"
    )


def _table(file: str) -> dict[str, Any]:
    return tomllib.loads(_text(file))


def _text(file: str) -> str:
    return (_FILES / f"{file}.toml").read_text(encoding="utf-8")


def _first_sentence(text: str) -> str:
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).split(". ")[0].rstrip(".")
