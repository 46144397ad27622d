"""Nested dictionaries as TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fxquant.recipe.keys import join

__all__ = ["to_toml"]


def to_toml(table: Mapping[str, Any]) -> str:
    """A recipe's nested dictionaries as TOML that reads back equal."""
    lines: list[str] = []
    _write(table, "", lines)
    return "\n".join(lines).strip() + "\n"


def _write(table: Mapping[str, Any], where: str, lines: list[str]) -> None:
    nested: list[tuple[str, Any]] = []
    for key, value in table.items():
        if (isinstance(value, Mapping) and key != "options") or _is_tables(value):
            nested.append((key, value))
        else:
            lines.append(f"{key} = {_value(value)}")
    for key, value in nested:
        path = join(where, key)
        for item in value if _is_tables(value) else [value]:
            lines += ["", f"[[{path}]]" if _is_tables(value) else f"[{path}]"]
            _write(item, path, lines)


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{key} = {_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
