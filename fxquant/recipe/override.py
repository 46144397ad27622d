"""What a recipe changes for some modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

from fxquant.errors import RecipeError
from fxquant.recipe.keys import Table, check_keys, is_table, join, key
from fxquant.recipe.selector import SELECTOR_KINDS, Selector
from fxquant.recipe.tables import ActivationRecipe, OperationRecipe, WeightRecipe

__all__ = ["Changed", "Override", "merge"]

Partial = tuple[tuple[str, Any], ...]
"""Some keys of a table and their values, sorted by key; an ``options`` value is one too."""

_CHANGED: Mapping[str, type[Table]] = {
    "weights": WeightRecipe,
    "activations": ActivationRecipe,
    "inputs": ActivationRecipe,
    "operations": OperationRecipe,
}


@dataclass(frozen=True)
class Override(Table):
    """What is different for some modules: one selector, and the keys that change.

    An observer that is named without options takes its defaults.
    """

    where: ClassVar[str] = "overrides"

    modules: str = key("", "a selector: a glob, see `Selector`.")
    regex: str = key("", "a selector: a regular expression.")
    type: str = key("", "a selector: a class name.")
    position: Literal["", "first", "last"] = key("", "a selector: first or last layer.")
    weights: Partial = key((), "keys of `WeightRecipe`.", check=is_table)
    activations: Partial = key(
        (), "keys of `ActivationRecipe`, for what the modules make.", check=is_table
    )
    inputs: Partial = key(
        (), "keys of `ActivationRecipe`, for what the modules read.", check=is_table
    )
    operations: Partial = key((), "keys of `OperationRecipe`.", check=is_table)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [kind for kind in SELECTOR_KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise RecipeError(
                f"overrides: each needs exactly one of {', '.join(SELECTOR_KINDS)}, "
                f"got {', '.join(given) or 'none'}"
            )
        for table in _CHANGED:
            values = dict(getattr(self, table))
            if "options" in values:
                values["options"] = tuple(sorted(dict(values["options"]).items()))
            object.__setattr__(self, table, tuple(sorted(values.items())))
        _ = self.selector

    @property
    def selector(self) -> Selector:
        """What the override applies to."""
        return next(
            Selector(kind, getattr(self, kind)) for kind in SELECTOR_KINDS if getattr(self, kind)
        )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], where: str | None = None) -> Self:
        """An override from its keys.

        Raises:
            RecipeError: a key is unknown or its value is wrong.
        """
        place = cls.where if where is None else where
        check_keys(table, cls, place)
        for name, kind in _CHANGED.items():
            check_keys(table.get(name, {}), kind, join(place, name))
        return super().from_dict(table, place)

    def to_dict(self) -> dict[str, Any]:
        """The keys that are set."""
        return {name: value for name, value in super().to_dict().items() if value}


Changed = TypeVar("Changed", WeightRecipe, ActivationRecipe)


def merge(table: Changed, partial: Partial) -> Changed:
    """A table with the changes of an override; a new observer drops the old one's options."""
    changes = dict(partial)
    if not changes:
        return table
    if changes.get("observer", table.observer) != table.observer:
        changes.setdefault("options", ())
    elif "options" in changes:
        changes["options"] = tuple({**dict(table.options), **dict(changes["options"])}.items())
    return replace(table, **changes)
