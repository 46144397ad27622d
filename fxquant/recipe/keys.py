"""A recipe's tables are dataclasses whose fields say all about their key.

What a key may hold follows from the annotation of its field, with the bounds of `key`; so do the
message where it holds something else, how it is read and written, and the documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache, partial
from textwrap import fill
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from fxquant.arguments import checked
from fxquant.errors import RecipeError, nearest
from fxquant.recipe.checks import Check, are_texts, is_boolean, is_text, one_of, within

__all__ = ["Key", "Table", "check_keys", "is_table", "join", "key", "unknown_key"]

Number = int | float


def key(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Callable[[], Iterable[object]] | None = None,
    check: Check | None = None,
) -> Any:
    """A field of a `Table`.

    Args:
        default: its value, or the class of a table whose defaults it takes.
        meaning: what it says, for the documentation.
        low, high: the bounds of a number.
        choices: yields what it may be, where the annotation does not say so.
        check: what else decides whether a value is right.
    """
    about = {"meaning": meaning, "low": low, "high": high, "choices": choices, "check": check}
    if isinstance(default, type):
        return field(default_factory=default, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Key:
    """What a table says of one of its keys.

    Attributes:
        name: of the field.
        meaning: for the documentation.
        check: what is wrong with a value.
        choices: yields what it may be, where that is a list.
        table: the class of the table, or of the tables in a list, that it holds.
        listed: it holds a list.
    """

    name: str
    meaning: str
    check: Check
    choices: Callable[[], Iterable[object]] = tuple
    table: type[Table] | None = None
    listed: bool = False

    def read(self, value: Any, where: str) -> Any:
        """A value as the dataclass holds it, from one of TOML or JSON."""
        if self.table is None:
            return tuple(value) if self.listed else value
        if self.listed:
            return tuple(self._table(item, f"{where}[{index}]") for index, item in enumerate(value))
        return self._table(value, where)

    def _table(self, value: Any, where: str) -> Table:
        assert self.table is not None
        return value if isinstance(value, Table) else self.table.from_dict(dict(value), where)

    def write(self, value: Any) -> Any:
        """A value for TOML or JSON."""
        if self.table is not None:
            return [item.to_dict() for item in value] if self.listed else value.to_dict()
        if self.listed:
            return list(value)
        # Pairs, such as an observer's options, are a table.
        if isinstance(value, tuple):
            return {name: self.write(item) for name, item in value}
        return value


@dataclass(frozen=True)
class Table:
    """Some keys with their values, checked whenever one is made.

    Raises:
        RecipeError: a value is wrong; names its key and what was expected.
    """

    where: ClassVar[str] = ""
    """The dotted path of the table; ``""`` for the recipe itself."""

    def __init_subclass__(cls) -> None:
        lines = [
            fill(
                f"{name}: {value.metadata['meaning']}",
                width=96,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )
            for name, value in vars(cls).items()
            if isinstance(value, Field)
        ]
        cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "Attributes:", *lines, ""])

    def __post_init__(self) -> None:
        check_keys({entry.name: getattr(self, entry.name) for entry in fields(self)}, type(self))
        for name, known in self.keys().items():
            value = known.read(getattr(self, name), join(self.where, name))
            object.__setattr__(self, name, value)

    @classmethod
    @cache
    def keys(cls) -> Mapping[str, Key]:
        """All keys by name."""
        # Names of the module, not of the class: `Recipe` has a key that is called float.
        hints = get_type_hints(cls, globals() | vars(sys.modules[cls.__module__]))
        return {entry.name: _key(entry, hints[entry.name]) for entry in fields(cls)}

    @classmethod
    @checked(table=RecipeError)
    def from_dict(cls, table: Mapping[str, Any], where: str | None = None) -> Self:
        """A table from its values; keys that are missing take their defaults.

        Raises:
            RecipeError: a key is unknown or its value is wrong.
        """
        check_keys(table, cls, where)
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """All keys as dictionaries, lists and plain values, ready for JSON."""
        return {name: known.write(getattr(self, name)) for name, known in self.keys().items()}


def check_keys(table: Mapping[str, Any], kind: type[Table], where: str | None = None) -> None:
    """Refuse keys that are not known and values that their key may not hold.

    Args:
        table: the values.
        kind: the table that knows the keys.
        where: the table's dotted path; default that of `kind`.

    Raises:
        RecipeError: names the key, its value, what was expected, and the nearest known keys.
    """
    place = kind.where if where is None else where
    known = kind.keys()
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        raise RecipeError(f"{place or 'a recipe'} must be a table of names and values")
    for name, value in table.items():
        if name not in known:
            raise RecipeError(unknown_key(name, known, place))
        complaint = known[name].check(value)
        if complaint:
            words = [word for word in known[name].choices() if isinstance(word, str)]
            hint = nearest(value, words) if isinstance(value, str) else ""
            raise RecipeError(f"{join(place, name)} {complaint}, got {value!r}{hint}")


def unknown_key(name: str, known: Iterable[str], where: str) -> str:
    """The message for a key that a table does not have."""
    known = list(known)
    hint = nearest(str(name), known) or f"; known are {', '.join(known)}"
    return f"unknown key {str(name)!r} in {where or 'the recipe'}{hint}"


def join(where: str, name: str) -> str:
    """The dotted path of a key in a table."""
    return f"{where}.{name}" if where else name


# -- what a key may hold ---------------------------------------------------------------------


def is_table(value: object) -> str | None:
    """The check of a key that holds a table, or the pairs of one."""
    if isinstance(value, (Mapping, Table)):
        return None
    pairs = isinstance(value, tuple) and all(
        isinstance(item, tuple) and len(item) == 2 for item in value
    )
    return None if pairs else "must be a table"


def _key(entry: Field[Any], hint: Any) -> Key:
    about = entry.metadata
    assert entry.default is not MISSING or entry.default_factory is not MISSING
    listed = get_origin(hint) is tuple and get_args(hint)[-1] is ...
    item = get_args(hint)[0] if listed else hint
    table = item if isinstance(item, type) and issubclass(item, Table) else None
    # `Options` and `Partial` are lists of pairs; they stand for tables.
    listed = listed and get_origin(item) is not tuple
    choices = about["choices"] or partial(_literals, hint)
    check = about["check"] or _check_of(hint, about, choices, listed=listed, table=table)
    return Key(entry.name, about["meaning"], check, choices, table, listed)


def _check_of(
    hint: Any,
    about: Mapping[str, Any],
    choices: Callable[[], Iterable[object]],
    *,
    listed: bool,
    table: type[Table] | None,
) -> Check:
    if table is not None:
        return _are_tables if listed else is_table
    if listed:
        return are_texts
    if choices():
        return one_of(choices)
    if about["low"] is not None:
        return within(about["low"], about["high"], integer=hint is int)
    if hint not in (bool, str):
        raise TypeError(f"a key of type {hint} needs bounds, choices or a check of its own")
    return is_boolean if hint is bool else is_text


def _literals(hint: Any) -> tuple[object, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return tuple(value for part in get_args(hint) for value in _literals(part))
    return ()


def _are_tables(value: object) -> str | None:
    right = isinstance(value, (list, tuple)) and all(
        isinstance(item, (Mapping, Table)) for item in value
    )
    return None if right else "must be a list of tables"
