"""The keys of a recipe's tables: what each may hold, and the message where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxquant.errors import RecipeError, nearest
from fxquant.spec import check_options, split_observer

Check = Callable[[object], str | None]


def _one_of(*values: object) -> Check:
    shown = [json.dumps(value) for value in values]
    expected = f"must be {', '.join(shown[:-1])} or {shown[-1]}"

    def check(value: object) -> str | None:
        # True == 1 in Python; a recipe that says bits = true is a mistake.
        same = any(value == known and type(value) is type(known) for known in values)
        return None if same else expected

    return check


def _boolean(value: object) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _text(value: object) -> str | None:
    return None if isinstance(value, str) else "must be a text"


def _integer(low: int, high: int) -> Check:
    def check(value: object) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"must be an integer from {low} to {high}"

    return check


def _number(low: float, high: float) -> Check:
    def check(value: object) -> str | None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        right = number and low <= value <= high  # type: ignore[operator]
        return None if right else f"must be a number from {low:g} to {high:g}"

    return check


def _texts(value: object) -> str | None:
    right = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    return None if right else "must be a list of texts"


def _table(value: object) -> str | None:
    return None if isinstance(value, Mapping) else "must be a table"


def _tables(value: object) -> str | None:
    right = isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)
    return None if right else "must be a list of tables"


def _observer(value: object) -> str | None:
    if not isinstance(value, str):
        return "must be a text"
    try:
        split_observer(value)
    except RecipeError as error:
        return f"is an {error}"
    return None


Keys = Mapping[str, Check]

WEIGHT_KEYS: Keys = {
    "bits": _one_of(2, 3, 4, 5, 6, 7, 8, "float"),
    "scheme": _one_of("symmetric", "affine"),
    "granularity": _one_of("per_tensor", "per_channel"),
    "observer": _observer,
    "options": _table,
    "reduce_range": _boolean,
}
ACTIVATION_KEYS: Keys = {
    "bits": _one_of(2, 3, 4, 5, 6, 7, 8, 16, "float"),
    "scheme": _one_of("symmetric", "affine"),
    "observer": _observer,
    "options": _table,
    "one_sided": _boolean,
    "depthwise": _one_of("per_tensor", "per_channel"),
    "reduce_range": _boolean,
}
OPERATION_KEYS: Keys = {
    "softmax": _one_of("float", "table", "i-vit", "log2"),
    "softmax_bits": _one_of(8, 16),
    "probabilities": _one_of("per_tensor", "per_row"),
    "gelu": _one_of("float", "table", "i-vit"),
    "functions": _one_of("float", "table"),
    "layer_norm": _one_of("float", "i-vit", "integer", "power_of_two"),
    "residual": _one_of("float", 8, 16),
}
CALIBRATION_KEYS: Keys = {
    "source": _text,
    "images": _integer(0, 10**9),
    "batch_size": _integer(1, 10**6),
    "preset": _text,
}
OVERRIDE_KEYS: Keys = {
    "modules": _text,
    "regex": _text,
    "type": _text,
    "position": _one_of("first", "last"),
    "weights": _table,
    "activations": _table,
    "inputs": _table,
    "operations": _table,
}
RECIPE_KEYS: Keys = {
    "name": _text,
    "fusion": _one_of("all", "blocks", "none"),
    "fold_batch_norm": _boolean,
    "requantization": _one_of("float", "dyadic"),
    "equalize": _boolean,
    "bias_correction": _boolean,
    "reparameterize": _boolean,
    "smooth_quant": _number(0.0, 1.0),
    "split_outliers": _number(0.0, 1e6),
    "start_at": _text,
    "float": _texts,
    "quantize_output": _boolean,
    "dynamic": _boolean,
    "input_bits": _one_of(8, 16, "float"),
    "weights": _table,
    "activations": _table,
    "operations": _table,
    "reconstruction": _table,
    "calibration": _table,
    "overrides": _tables,
}


def check_keys(table: Mapping[str, Any], keys: Keys, where: str) -> None:
    """Refuse keys that are not known and values that their key may not hold.

    Args:
        table: the values.
        keys: what is known.
        where: the table's dotted path, ``""`` for the recipe itself.

    Raises:
        RecipeError: names the key, its value, what was expected, and the nearest known keys.
    """
    for key, value in table.items():
        if key not in keys:
            raise RecipeError(unknown_key(key, keys, where))
        complaint = keys[key](value)
        if complaint:
            raise RecipeError(f"{join(where, key)} {complaint}, got {value!r}")
    if "observer" in keys and "observer" in table:
        check_options(table["observer"], table.get("options", {}), join(where, "options"))


def unknown_key(key: str, keys: Iterable[str], where: str) -> str:
    """The message for a key that a table does not have."""
    known = list(keys)
    hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
    return f"unknown key {str(key)!r} in {where or 'the recipe'}{hint}"


def join(where: str, key: str) -> str:
    """The dotted path of a key in a table."""
    return f"{where}.{key}" if where else key


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
