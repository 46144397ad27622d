from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from fxquant.errors import RecipeError
from fxquant.recipe import Recipe
from fxquant.recipe.keys import Number, Table, key


@dataclass(frozen=True)
class Inner(Table):
    """A table in a table."""

    where: ClassVar[str] = "inner"

    width: int = key(2, "how wide.", low=1, high=4)


@dataclass(frozen=True)
class Outer(Table):
    """A table."""

    shape: Literal["round", 8] = key("round", "what it looks like.")
    share: Number = key(0.5, "how much.", low=0, high=1)
    names: tuple[str, ...] = key((), "who lives there.")
    inner: Inner = key(Inner, "see `Inner`.")
    several: tuple[Inner, ...] = key((), "more of them.")


def test_one_line_says_what_a_key_may_hold_and_what_it_means() -> None:
    assert "\n    share: how much.\n" in (Outer.__doc__ or "")
    with pytest.raises(RecipeError, match=r"^share must be a number from 0 to 1, got 1.5$"):
        Outer(share=1.5)
    with pytest.raises(RecipeError, match=r'^shape must be "round" or 8, got 8.0$'):
        Outer.from_dict({"shape": 8.0})


def test_tables_in_tables_read_back_equal() -> None:
    table = {"names": ["a"], "inner": {"width": 3}, "several": [{"width": 1}, {}]}
    made = Outer.from_dict(table)
    assert made.names == ("a",)
    assert made.several == (Inner(1), Inner(2))
    assert Outer.from_dict(made.to_dict()) == made
    assert Outer(inner={"width": 3}) == Outer(inner=Inner(3))  # type: ignore[arg-type]
    assert Outer(inner={"width": 3}) == Outer(inner=Inner(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"shap": 8}, "unknown key 'shap' in the recipe; did you mean 'shape'"),
        ({"shape": "rund"}, "must be \"round\" or 8, got 'rund'; did you mean 'round'"),
        ({"inner": 3}, "inner must be a table, got 3"),
        ({"inner": {"width": 9}}, "inner.width must be an integer from 1 to 4, got 9"),
        ({"several": [{}, {"wide": 1}]}, r"unknown key 'wide' in several\[1\]"),
    ],
)
def test_a_complaint_names_the_path(table: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Outer.from_dict(table)


def test_every_key_of_a_recipe_is_explained() -> None:
    waiting: list[type[Table]] = [Recipe]
    while waiting:
        for known in waiting.pop().keys().values():
            assert len(known.meaning) > 5, known.name
            waiting += [known.table] if known.table is not None else []
