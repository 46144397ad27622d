from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fxquant.errors import RecipeError
from fxquant.recipe import METHODS, Recipe, ReconstructionRecipe, learned_methods
from fxquant.recipe.methods import RoundingMethod
from fxquant.reconstruct import find_method, granularity, reconstruct
from fxquant.reconstruct.method import PAPERS, Goal, Method, Objective
from fxquant.reconstruct.schedule import beta, iterations_for
from tests.fxquant.reconstruct.graphs import graphs


def resolved(method: str, macs: float = 4e7, **options: Any) -> Method:
    """A method for a network; `depthwise` is of the network, the rest settings."""
    depthwise = options.pop("depthwise", False)
    settings = ReconstructionRecipe(method=method, **options)
    return find_method(method)(settings, macs, depthwise=depthwise)


class AbsoluteError(Method):
    """A method that is no part of fxquant."""

    def objective(self, goal: Goal) -> Objective:
        def error(y: Tensor, rows: Tensor) -> Tensor:
            return (y - goal.take(goal.target, rows)).abs().mean((1, 2, 3)[: y.dim() - 1]).sum()

        return error


def test_a_new_method_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = RoundingMethod("learned: absolute errors", f"{__name__}:AbsoluteError")
    monkeypatch.setitem(METHODS, "absolute", line)
    settings = Recipe.named("w4a8_absolute").reconstruction
    assert granularity(settings) == "block"
    found, x = graphs(), torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def error() -> float:
        with torch.no_grad():
            return float((found.simulated(x) - found.fused(x)).square().mean())

    nearest = error()
    quick = Recipe.named("w4a8_absolute").replace({"reconstruction.iterations": 100})
    notes = reconstruct(found.simulated, found.fused, found.data, quick.reconstruction)
    assert len(notes) == 3
    assert error() < 0.8 * nearest


@pytest.mark.parametrize("name", learned_methods())
def test_every_learned_method_of_the_table_is_there(name: str) -> None:
    method = find_method(name)
    assert method.__module__ == f"fxquant.reconstruct.methods.{name}"
    # Nothing may be left open where the recipe says nothing.
    open_keys = {"method", "seed", "blocks", "fisher", "drop", "temperature", "correction_weight"}
    values = vars(method.published).items()
    assert all(value for key, value in values if key not in open_keys)


def test_other_methods_learn_nothing() -> None:
    with pytest.raises(RecipeError, match="'gptq' learns no rounding: adaround"):
        find_method("gptq")


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [
        ("adaround", 0, {"iterations": 10_000, "drop": 0.0, "steps": "none"}),
        ("brecq", 5000, {"iterations": 20_000}),
        ("qdrop", 0, {"drop": 0.5, "scale_learning_rate": 4e-5, "steps": "jointly"}),
        ("pdquant", 0, {"temperature": 4.0, "learning_rate": 3e-3, "correction_weight": 0.02}),
    ],
)
def test_published_values_are_the_defaults(
    method: str, steps: int, expected: dict[str, Any]
) -> None:
    made = resolved(method, schedule="published")
    settings = made.settings
    assert {key: getattr(settings, key) for key in expected} == expected
    assert made.step_iterations == steps
    assert (settings.images, settings.batch_size, settings.regularizer) == (1024, 32, 0.01)


def test_depthwise_networks_have_published_values_of_their_own() -> None:
    found = resolved("pdquant", schedule="published", depthwise=True).settings
    assert (found.regularizer, found.temperature, found.correction_weight) == (0.1, 1.0, 0.005)
    chosen = resolved("brecq", schedule="published", regularizer=0.02, depthwise=True).settings
    assert chosen.regularizer == 0.02
    assert resolved("brecq", depthwise=True).settings.regularizer == 0.01


def test_what_is_set_overrules_the_papers() -> None:
    settings = resolved("qdrop", iterations=77, drop=0.3, learning_rate=0.5).settings
    assert (settings.iterations, settings.drop, settings.learning_rate) == (77, 0.3, 0.5)
    assert granularity(ReconstructionRecipe(method="qdrop", granularity="stage")) == "stage"
    assert granularity(ReconstructionRecipe(method="adaround")) == "layer"


@pytest.mark.parametrize("method", learned_methods())
def test_steps_behind_the_weights_have_iterations_of_their_own(method: str) -> None:
    assert resolved(method, steps="after", iterations=100).step_iterations == 25
    assert resolved(method, steps="jointly", iterations=100).step_iterations == 0


def test_adaptive_runs_are_shorter_on_larger_networks_and_learn_faster() -> None:
    counts = [iterations_for(macs) for macs in (1e6, 41e6, 3e8, 1.8e9, 1e12)]
    assert counts == sorted(counts, reverse=True)
    assert counts[1] == 1000
    assert counts[-1] == 250
    assert resolved("brecq", 41e6).settings.learning_rate == pytest.approx(0.1)
    assert resolved("brecq", 1e12).settings.learning_rate == 0.2


def test_beta_is_annealed_after_the_warm_up() -> None:
    settings = resolved("brecq", 1e6, iterations=100).settings
    assert beta(settings, 19) is None
    assert beta(settings, 20) == 20.0
    assert beta(settings, 60) == pytest.approx(11.0)
    assert beta(settings, 99) == pytest.approx(2.0, abs=0.3)


def test_every_method_gets_the_same_iterations() -> None:
    counts = {name: resolved(name, 41e6, granularity="block") for name in learned_methods()}
    assert {method.settings.iterations for method in counts.values()} == {1000}


class Looks(Method):
    """Drops nearly everything, and looks at what the two objectives are given."""

    published = replace(PAPERS, drop=0.99)
    seen: ClassVar[list[tuple[float, float]]] = []

    def objective(self, goal: Goal) -> Objective:
        def error(y: Tensor, rows: Tensor) -> Tensor:
            self.dropped = float(goal.error(y.detach(), rows))
            return goal.error(y, rows)

        return error

    def prediction_objective(self, goal: Goal) -> Objective:
        def error(y: Tensor, rows: Tensor) -> Tensor:
            self.seen.append((self.dropped, float(goal.error(y.detach(), rows))))
            return 0 * y.sum()

        return error


def test_the_prediction_is_that_of_an_output_with_nothing_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "looks", RoundingMethod("learned: looks", f"{__name__}:Looks"))
    recipe = Recipe.named("w8a2_looks").replace({"reconstruction.iterations": 2})
    found = graphs(changes={"weights.bits": 8, "activations.bits": 2})
    reconstruct(found.simulated, found.fused, found.data, recipe.reconstruction)
    # At 2-bit activations and 8-bit weights, what drops its quantizers is nearly the float block.
    assert all(dropped < 0.5 * whole for dropped, whole in Looks.seen)


def test_the_correction_of_inputs_is_as_much_shorter_as_the_training() -> None:
    made = [find_method("pdquant")(ReconstructionRecipe(iterations=n), 1e6) for n in (10, 2000)]
    assert [method.correction.steps for method in made] == [10, 50]  # type: ignore[attr-defined]
