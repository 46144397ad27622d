from __future__ import annotations

from typing import Any

import pytest

from fxquant.errors import RecipeError
from fxquant.recipe.reconstruction import ReconstructionRecipe, iterations_for


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("adaround", {"iterations": 10_000, "drop": 0.0, "steps": "none"}),
        ("brecq", {"iterations": 20_000, "step_iterations": 5000}),
        ("qdrop", {"drop": 0.5, "scale_learning_rate": 4e-5, "steps": "jointly"}),
        ("pdquant", {"temperature": 4.0, "learning_rate": 3e-3, "correction_steps": 500}),
    ],
)
def test_published_values_are_the_defaults(method: str, expected: dict[str, Any]) -> None:
    recipe = ReconstructionRecipe(method=method, schedule="published")  # type: ignore[arg-type]
    schedule = recipe.schedule_for(4e7)
    assert {key: getattr(schedule, key) for key in expected} == expected
    assert (schedule.images, schedule.batch_size, schedule.regularizer) == (1024, 32, 0.01)


def test_depthwise_networks_have_published_values_of_their_own() -> None:
    recipe = ReconstructionRecipe(method="pdquant", schedule="published")
    schedule = recipe.schedule_for(3e8, depthwise=True)
    found = (schedule.regularizer, schedule.temperature, schedule.correction_weight)
    assert found == (0.1, 1.0, 0.005)
    chosen = ReconstructionRecipe(method="brecq", schedule="published", regularizer=0.02)
    assert chosen.schedule_for(3e8, depthwise=True).regularizer == 0.02


def test_what_is_set_overrules_the_papers() -> None:
    recipe = ReconstructionRecipe(
        method="qdrop", iterations=77, drop=0.3, learning_rate=0.5, granularity="stage"
    )
    schedule = recipe.schedule_for(4e7)
    assert (schedule.iterations, schedule.drop, schedule.learning_rate) == (77, 0.3, 0.5)
    assert recipe.unit == "stage"
    assert ReconstructionRecipe(method="adaround").unit == "layer"


def test_adaptive_runs_are_shorter_on_larger_networks_and_learn_faster() -> None:
    counts = [iterations_for(macs) for macs in (1e6, 41e6, 3e8, 1.8e9, 1e12)]
    assert counts == sorted(counts, reverse=True)
    assert counts[1] == 1000
    assert counts[-1] == 250
    recipe = ReconstructionRecipe(method="brecq")
    assert recipe.schedule_for(41e6).learning_rate == pytest.approx(0.1)
    assert recipe.schedule_for(1e12).learning_rate == 0.2


def test_beta_is_annealed_after_the_warm_up() -> None:
    schedule = ReconstructionRecipe(method="brecq", iterations=100).schedule_for(1e6)
    assert schedule.beta(19) is None
    assert schedule.beta(20) == 20.0
    assert schedule.beta(60) == pytest.approx(11.0)
    assert schedule.beta(99) == pytest.approx(2.0, abs=0.3)


def test_predictions_cost_iterations() -> None:
    recipe = ReconstructionRecipe(method="pdquant")
    assert recipe.schedule_for(41e6, 11).iterations < recipe.schedule_for(41e6, 1).iterations < 1000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "adarond"),
        ("granularity", "channel"),
        ("iterations", -1),
        ("iterations", 1.5),
        ("drop", 1.5),
        ("fisher", 1),
        ("memory_gib", 0),
        ("schedule", ""),
    ],
)
def test_refuses_wrong_values_by_name(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"reconstruction.{key} must be"):
        ReconstructionRecipe(**{key: value})  # type: ignore[arg-type]


def test_only_learned_methods_have_a_schedule() -> None:
    with pytest.raises(RecipeError, match="learns no rounding"):
        ReconstructionRecipe(method="gptq").schedule_for(1e6)
