"""An accuracy target: the layers that cost most are raised, step by step, until it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxquant.arguments import checked_class
from fxquant.compiled import CompiledModel
from fxquant.errors import (
    AccuracyError,
    CompileError,
    InputError,
    ModelError,
    RecipeError,
    TargetError,
)
from fxquant.frontend.inputs import inputs_needed
from fxquant.measure.metric import TOP1, Metric, as_metric
from fxquant.measure.paired import check_samples, quantile, standard_error
from fxquant.measure.rungs import (
    Rung,
    divergence,
    few_bits,
    free_changes,
    noise,
    raised,
    to_float,
    to_integers,
)
from fxquant.measure.sensitivity import Sensitivity, measure
from fxquant.metrics import samples_of
from fxquant.recipe import Recipe
from fxquant.report.accuracy import AccuracyStep, AccuracyTrail

__all__ = ["Drop"]

_NEGLIGIBLE = 0.01
"""What is left of the first harm once steps no longer take half of the rest, but all of it."""


@checked_class
@dataclass(frozen=True)
class Drop:
    """At most so much less of a metric than the float model has; see `fxquant.compile`.

    `most` is in the unit of the metric (of top-1: percentage points), or, where `relative`, in
    percent of the float model's value. It holds where the drop on the images plus what chance may
    carry it stays below: the upper bound of the mean of each image's own difference at
    `confidence`, one-sided; 0.5 takes the drop as it is measured. A metric of all images together
    has no differences, and is taken so too. Sensitivities are measured on `images` images, and at
    most `steps` models are compiled.

    The first step is what costs nothing when the model runs: ranges that were searched for instead
    of extremes, a scale a channel in front of depthwise convolutions, GPTQ for weights of fewer
    than 8 bits. Then what each layer's weight and each value alone costs is measured, as
    `fxquant.sensitivity` does, and each step raises the fewest that make up half of what is left:
    weights and values of fewer than 8 bits to 8, values to 16; whole layers to float last. Of the
    last step, halves are given back while the target holds.

    Raises InputError for a number that makes no sense.
    """

    most: float
    relative: bool = False
    images: int = 32
    steps: int = 30
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.most < math.inf:
            raise InputError(f"Drop: a drop of {self.most!r} is no positive number")
        if not 0.5 <= self.confidence < 1:
            raise InputError(
                f"Drop: confidence is {self.confidence!r}, expected at least 0.5, which takes the "
                "drop as it is measured, and less than 1"
            )
        for name in ("images", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"Drop: {name} is {getattr(self, name)}, expected at least 1")

    def meet(
        self,
        compiled: Callable[[Recipe], CompiledModel],
        recipe: Recipe,
        *,
        model: nn.Module,
        batches: Iterable[Any],
        metric: Metric | Callable[..., Any] | None = None,
        progress: bool = False,
    ) -> CompiledModel:
        """The first model of those that `compiled` makes of raised recipes that holds the target.

        Its report lists the steps. Raises AccuracyError where none does, and what `Metric` raises.
        """
        search = _Search(self, compiled, model, batches, as_metric(metric), progress)
        search.run(recipe)
        return search.result()


class _Search:
    def __init__(
        self,
        target: Drop,
        compiled: Callable[[Recipe], CompiledModel],
        model: nn.Module,
        batches: Iterable[Any],
        metric: Metric,
        progress: bool,
    ) -> None:
        self.target, self.compiled, self.metric = target, compiled, metric
        self.progress = progress
        if not hasattr(batches, "__iter__"):
            raise InputError(
                f"validation is a {type(batches).__name__}: give batches to measure on"
            )
        self.batches = _Seen(batches)
        self.inputs = inputs_needed(model)
        bar = "float" if progress else ""
        self.float = metric.judge(model, self.batches, bar=bar, inputs=self.inputs)
        scale = abs(self.float.value) / 100 if target.relative else 1.0
        self.most = target.most * scale
        check_samples(self.float, self.most, target.confidence, metric.name)
        self.steps: list[AccuracyStep] = []
        self.kept: tuple[int, CompiledModel] | None = None

    def run(self, recipe: Recipe) -> None:
        """Raise until the target holds, or nothing is left to raise."""
        if self._try((), recipe) or recipe.dynamic:
            return
        assert self.kept is not None
        free = free_changes(recipe, self.kept[1])
        if free:
            before = self.kept
            names = tuple(f": {key} = {value}" for key, value in free.items())
            if self._try(names, recipe.replace(free)):
                return
            if self.kept is not before:
                recipe = recipe.replace(free)
        q = self.kept[1]
        # A prediction's divergence says little of an output that is judged by something else.
        harm = divergence if self.metric is TOP1 else noise
        values = few_bits(q, "values")
        if few_bits(q, "weights") and not values:
            # Values at 8 bits seldom come to harm beside these: they are measured where they do.
            found = self._measured(q, recipe, activations=False)
            recipe = self._climb(to_integers(q, found, harm), recipe)
            if self._holds():
                return
        found = self._measured(q, recipe, activations=True)
        rungs = to_integers(q, found, harm)
        recipe = self._climb([r for r in rungs if values or r.what != "weights"], recipe)
        if not self._holds():
            self._climb(to_float(q, found, harm), recipe)

    def _measured(self, q: CompiledModel, recipe: Recipe, *, activations: bool) -> Sensitivity:
        return measure(
            q,
            recipe,
            self.batches,
            bits=sorted({8, *few_bits(q, "weights"), *few_bits(q, "values")}),
            activations=activations,
            images=self.target.images,
            progress=self.progress,
        )

    def result(self) -> CompiledModel:
        """The model that holds the target. Raises AccuracyError with the nearest where none is."""
        assert self.kept is not None
        number, q = self.kept
        trail = AccuracyTrail(
            self.metric.name,
            self.metric.larger_is_better,
            self.float.value,
            self.most,
            self.batches.images,
            tuple(self.steps),
            number,
            self.target.confidence,
        )
        q.report = replace(q.report, accuracy=trail)
        if self._holds():
            return q
        more = ", give more images" if trail.bound > trail.drop else ""
        raise AccuracyError(
            f"{self.metric.name} {trail.words} against float's {self.float.value:.5g}, more than "
            f"{self.most:.4g}, with all raised that can be in {len(self.steps)} steps: allow a "
            f"larger drop{more}, or start from a recipe of more bits (the error's `best` is the "
            "nearest model, its report lists the steps)",
            q,
        )

    def _climb(self, rungs: Sequence[Rung], recipe: Recipe) -> Recipe:
        """Raise groups of rungs, the worst first; the recipe with all that could be."""
        rungs = sorted(rungs, key=lambda rung: -rung.harm)
        least = _NEGLIGIBLE * sum(rung.harm for rung in rungs)
        waiting = list(rungs)
        refused: list[list[Rung]] = []
        while (waiting or refused) and not self._exhausted():
            if refused:
                group = refused.pop()
            else:
                group = _worst_half(waiting, least)
                waiting = waiting[len(group) :]
            before = len(self.steps)
            holds = self._try(tuple(map(str, group)), raised(recipe, group))
            if self.steps[before].refused:
                half = len(group) // 2
                refused += [
                    part for part in (group[half:], group[:half]) if 0 < len(part) < len(group)
                ]
                continue
            if holds:
                return self._give_back(recipe, group)
            recipe = raised(recipe, group)
        return recipe

    def _give_back(self, recipe: Recipe, group: list[Rung]) -> Recipe:
        """Fewer of the last group, while the target holds."""
        while len(group) > 1 and not self._exhausted():
            half = group[: len(group) // 2]
            if not self._try(tuple(map(str, half)), raised(recipe, half)):
                break
            group = half
        return raised(recipe, group)

    def _try(self, raised: tuple[str, ...], recipe: Recipe) -> bool:
        """Compile and measure; keep what holds, or comes nearer; whether the target holds."""
        try:
            q = self.compiled(recipe)
        except (CompileError, RecipeError, TargetError, ModelError) as error:
            if not self.steps:
                raise
            self.steps.append(AccuracyStep(raised, None, refused=str(error)))
            return False
        bar = f"step {len(self.steps)}" if self.progress else ""
        found = self.metric.judge(q, self.batches, bar=bar, inputs=self.inputs)
        bound = self.metric.drop(self.float.value, found.value)
        bound += quantile(self.target.confidence) * (standard_error(self.float, found) or 0.0)
        report = q.report
        step = AccuracyStep(raised, found.value, report.size_bytes, report.int8_share, bound=bound)
        self.steps.append(step)
        holds = bound <= self.most
        if holds or self.kept is None or bound <= self._kept_bound() > self.most:
            self.kept = (len(self.steps) - 1, q)
        return holds

    def _holds(self) -> bool:
        return self._kept_bound() <= self.most

    def _kept_bound(self) -> float:
        assert self.kept is not None
        bound = self.steps[self.kept[0]].bound
        assert bound is not None
        return bound

    def _exhausted(self) -> bool:
        return len(self.steps) >= self.target.steps


class _Seen:
    """Batches that can be walked over again, and how many images a walk sees."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = list(batches) if iter(batches) is batches else batches
        self.images = 0

    def __iter__(self) -> Any:
        seen = 0
        for batch in self._batches:
            seen += samples_of(batch)
            self.images = max(self.images, seen)
            yield batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]


def _worst_half(rungs: Sequence[Rung], least: float) -> list[Rung]:
    """The first of the sorted rungs that make up half of their harm; all where little is left."""
    rest = sum(rung.harm for rung in rungs)
    if rest <= least:
        return list(rungs)
    taken = 0.0
    for count, rung in enumerate(rungs, 1):
        taken += rung.harm
        if taken >= rest / 2:
            return list(rungs[:count])
    return list(rungs)
