"""Inputs that are dicts, tuples, dataclasses and named tuples of tensors: what shape they have.

A graph takes tensors, one an input. What `forward` takes is taken apart on the way in, and put
together again where the model's own code runs. A file holds the shapes, and no classes: a named
tuple or a dataclass of a loaded file is recognized by its fields.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxquant.errors import InputError

__all__ = ["Names", "Structure", "is_container", "names_of", "structure_of"]

_LEAF, _CONSTANT = "leaf", "constant"
_SEQUENCES = {"tuple": tuple, "list": list}


@dataclass(frozen=True)
class Structure:
    """A tensor, a constant, or a container of them.

    `kind` is leaf, constant, tuple, list, dict, namedtuple or dataclass; `keys` are those of a
    dict or the fields, `name` is that of the class, `value` a constant's.
    """

    kind: str = _LEAF
    children: tuple[Structure, ...] = ()
    keys: tuple[str, ...] = ()
    name: str = ""
    value: Any = None
    made: type | None = field(default=None, compare=False, repr=False)

    def paths(self, prefix: str) -> Iterator[str]:
        """A name for every tensor, such as ``batch_image``."""
        if self.kind == _LEAF:
            yield prefix
        for number, child in enumerate(self.children):
            key = self.keys[number] if self.keys else ""
            yield from child.paths(f"{prefix}_{key if key.isidentifier() else number}")

    def flat(self, value: Any, where: str) -> Iterator[Any]:
        """The tensors of `value`. Raises InputError where it has another shape."""
        if self.kind == _LEAF:
            yield value
            return
        if self.kind == _CONSTANT:
            if isinstance(value, Tensor) or value != self.value:
                found = type(value).__name__ if isinstance(value, Tensor) else repr(value)
                raise InputError(
                    f"{where} is {found}, it was {self.value!r} when the model was compiled"
                )
            return
        for key, child, item in zip(
            self.keys or range(len(self.children)), self.children, self._items(value, where),
            strict=True,
        ):  # fmt: skip
            yield from child.flat(item, f"{where}[{key!r}]")

    def built(self, leaves: Iterator[Any]) -> Any:
        """The container again, of the tensors in the order of `flat`."""
        if self.kind == _LEAF:
            return next(leaves)
        if self.kind == _CONSTANT:
            return self.value
        items = [child.built(leaves) for child in self.children]
        if self.kind in _SEQUENCES:
            return _SEQUENCES[self.kind](items)
        named = dict(zip(self.keys, items, strict=True))
        return named if self.kind == "dict" else self._type()(**named)

    def to_json(self) -> Any:
        """Plain data."""
        if self.kind in (_LEAF, _CONSTANT):
            return {"kind": self.kind, "value": self.value}
        children = [child.to_json() for child in self.children]
        return {"kind": self.kind, "name": self.name, "keys": self.keys, "children": children}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Structure:
        """What `to_json` gave. Raises KeyError, ValueError for anything else."""
        if data["kind"] in (_LEAF, _CONSTANT):
            return cls(data["kind"], value=data["value"])
        children = tuple(cls.from_json(child) for child in data["children"])
        found = cls(data["kind"], children, tuple(data["keys"]), data["name"])
        if found.keys and len(found.keys) != len(children):
            raise ValueError(f"{len(children)} children have {len(found.keys)} keys")
        if found.kind in ("namedtuple", "dataclass"):
            found._type()
        elif found.kind != "dict" and found.kind not in _SEQUENCES:
            raise ValueError(f"{found.kind!r} is no container")
        return found

    def _items(self, value: Any, where: str) -> Sequence[Any]:
        keys = None
        if self.kind == "dict" and isinstance(value, Mapping):
            keys, items = set(value), [value.get(key) for key in self.keys]
        elif self.kind in ("namedtuple", "dataclass") and all(hasattr(value, k) for k in self.keys):
            keys, items = set(self.keys), [getattr(value, key) for key in self.keys]
        elif self.kind in _SEQUENCES and isinstance(value, (tuple, list)):
            items = list(value)
        else:
            raise InputError(f"{where} is a {type(value).__name__}, expected {self._words()}")
        if len(items) != len(self.children) or (keys is not None and keys != set(self.keys)):
            found = f"{len(items)} values" if keys is None else ", ".join(map(repr, value))
            raise InputError(f"{where} holds {found}, expected {self._words()}")
        return items

    def _words(self) -> str:
        if self.kind in _SEQUENCES:
            return f"a {self.kind} of {len(self.children)} values"
        return f"a {self.name or self.kind} of {', '.join(self.keys)}"

    def _type(self) -> Any:
        if self.made is not None:
            return self.made
        if self.kind == "namedtuple":
            return namedtuple(self.name, self.keys)
        return dataclasses.make_dataclass(self.name, self.keys)


class Names(tuple[str, ...]):
    """The names of a graph's inputs, and the parameters of `forward` that they are parts of."""

    structures: Mapping[str, Structure]

    def __new__(cls, structures: Mapping[str, Structure]) -> Names:
        """Of the structures by the parameters' names."""
        leaves: list[str] = []
        for name, each in structures.items():
            for path in each.paths(name):
                leaves.append(next(p for p in _variants(path) if p not in leaves))
        found = super().__new__(cls, leaves)
        found.structures = dict(structures)
        return found

    def __reduce__(self) -> Any:
        """By its structures: a tuple knows of its items alone."""
        return Names, (self.structures,)

    @property
    def nested(self) -> bool:
        """Whether an input is anything but a tensor."""
        return any(each.kind != _LEAF for each in self.structures.values())

    def flat(self, values: Mapping[str, Any]) -> list[Any]:
        """The tensors of what the parameters are given. Raises InputError for another shape."""
        return [
            leaf
            for name, each in self.structures.items()
            for leaf in each.flat(values[name], f"input {name}")
        ]

    def built(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """What the parameters are given, of the tensors in the order of the names."""
        rest = iter(leaves)
        return {name: each.built(rest) for name, each in self.structures.items()}


def _variants(path: str) -> Iterator[str]:
    yield path
    yield from (f"{path}_{number}" for number in itertools.count())


def names_of(values: Mapping[str, Any]) -> Names:
    """Of what the parameters are given. Raises InputError for what holds no tensors."""
    return Names({name: structure_of(value, f"input {name}") for name, value in values.items()})


def structure_of(value: Any, where: str) -> Structure:
    """Of one value. Raises InputError for a class that is no container."""
    if isinstance(value, Tensor):
        return Structure()
    if value is None or isinstance(value, (bool, int, float, str)):
        return Structure(_CONSTANT, value=value)
    kind, keys, items = _taken_apart(value)
    if not kind or not all(isinstance(key, str) for key in keys):
        what = "has keys that are no strings" if kind else f"is a {type(value).__name__}"
        raise InputError(
            f"{where} {what}: give a tensor, or a tuple, list, dict, named tuple or dataclass of "
            "tensors"
        )
    children = tuple(
        structure_of(item, f"{where}[{key!r}]")
        for key, item in zip(keys or range(len(items)), items, strict=True)
    )
    named = kind in ("namedtuple", "dataclass")
    made = type(value) if named else None
    return Structure(kind, children, tuple(keys), made.__name__ if made else "", made=made)


def is_container(value: Any) -> bool:
    """Whether it is something that a `Structure` takes apart."""
    return bool(_taken_apart(value)[0])


def _taken_apart(value: Any) -> tuple[str, Sequence[Any], Sequence[Any]]:
    if isinstance(value, Mapping):
        return "dict", list(value), list(value.values())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "namedtuple", value._fields, value
    if isinstance(value, (tuple, list)):
        return "tuple" if isinstance(value, tuple) else "list", (), value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = [each.name for each in dataclasses.fields(value) if each.init]
        return "dataclass", keys, [getattr(value, key) for key in keys]
    return "", (), ()
