from __future__ import annotations

import pytest

from fxquant.errors import RecipeError
from fxquant.recipe import METHODS, Recipe, ReconstructionRecipe, learned_methods


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("method", "adarond", '"none", "gptq", "adaround", .*'),
        ("granularity", "channel", '"layer", "block", "stage" or "model"'),
        ("iterations", -1, "an integer from 0 to 10000000"),
        ("iterations", 1.5, "an integer from 0 to 10000000"),
        ("drop", 1.5, "a number from 0 to 1"),
        ("fisher", 1, "true or false"),
        ("memory_gib", 0, "a number from 0.01 to 100000"),
        ("schedule", "", '"adaptive" or "published"'),
        ("blocks", "layer1", "a list of texts"),
    ],
)
def test_refuses_wrong_values_by_name(key: str, value: object, expected: str) -> None:
    with pytest.raises(RecipeError, match=f"reconstruction.{key} must be .*{expected}, got"):
        ReconstructionRecipe(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "learned", "closed_form"),
    [("none", False, False), ("gptq", False, True), ("brecq", True, False)],
)
def test_says_how_its_method_rounds(method: str, learned: bool, closed_form: bool) -> None:
    recipe = ReconstructionRecipe(method=method)
    assert (recipe.learned, recipe.starts_closed_form) == (learned, closed_form)


def test_a_learned_rounding_may_start_from_the_closed_form() -> None:
    assert ReconstructionRecipe(method="qdrop", start="gptq").starts_closed_form


def test_every_method_can_stand_at_the_end_of_a_name() -> None:
    assert set(learned_methods()) < set(METHODS)
    for method in METHODS:
        assert Recipe.named(f"w4a8_{method}").reconstruction.method == method
