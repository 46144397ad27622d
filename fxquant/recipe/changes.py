"""Changes of a recipe by dotted path: ``{"weights.bits": 4}``, and ``weights.bits=4`` as a text."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from fxquant.errors import RecipeError
from fxquant.recipe.keys import join, unknown_key

__all__ = ["apply_changes", "parse_assignment"]


def apply_changes(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change the nested dictionaries of a whole recipe in place.

    Raises:
        RecipeError: a path is unknown; says the nearest ones.
    """
    known = _dotted_paths(table)
    for path, value in _flatten(changes):
        *parents, last = path.split(".")
        target: Any = table
        for part in parents:
            target = target.get(part) if isinstance(target, dict) else None
        in_options = bool(parents) and parents[-1] == "options"
        if not isinstance(target, dict) or (last not in target and not in_options):
            raise RecipeError(unknown_key(path, known, "the recipe"))
        if last == "observer" and value != target["observer"]:
            target["options"] = {}
        target[last] = value


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"weights.bits=4"`` as ``("weights.bits", 4)``.

    The value is read as TOML; what is no TOML value is a text, so ``fusion=all`` needs no quotes.

    Raises:
        RecipeError: there is no ``=`` or no key.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"{text!r} is no KEY=VALUE, such as weights.bits=4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _flatten(changes: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in changes.items():
        if not isinstance(key, str):
            raise RecipeError(f"{key!r} is no key of a recipe: give names such as weights.bits")
        path = join(where, key)
        if isinstance(value, Mapping) and path.split(".")[-1] != "options":
            flat += _flatten(value, path)
        else:
            flat.append((path, value))
    # An observer drops the options of the one before it, so it must come before its own.
    return sorted(flat, key=lambda item: not item[0].endswith(".observer"))


def _dotted_paths(table: Mapping[str, Any], where: str = "") -> list[str]:
    paths: list[str] = []
    for key, value in table.items():
        path = join(where, key)
        paths.append(path)
        if isinstance(value, dict):
            paths += _dotted_paths(value, path)
    return paths
