"""A bit width for each layer under a size budget, from measured sensitivities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np

from fxquant.arguments import checked
from fxquant.artifact.packing import WIDTHS
from fxquant.errors import RecipeError, nearest
from fxquant.measure.sensitivity import Effect, Sensitivity
from fxquant.recipe import Override, Recipe

__all__ = ["auto_recipe", "choose_bits", "weight_bytes"]

Objective = Literal["kl", "loss", "noise"]
Storage = Literal["file", "bits"]

_MOST_UNITS = 1 << 20


@checked(but=("objective",), fixed=RecipeError)
def choose_bits(
    sensitivity: Sensitivity,
    size_budget_bytes: float | None = None,
    *,
    ratio: float | None = None,
    objective: Objective = "kl",
    storage: Storage = "file",
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The bit width of each layer's weight that minimizes the summed harm under a size budget.

    The effects of layers are taken to add up. What is left is a multiple-choice knapsack: one
    width for each layer, the least harm, a total size within the budget. Dynamic programming over
    the sizes solves it exactly; where more than 2^20 sizes are possible, they are counted in
    coarser units and rounded up, so that the budget holds and the harm is close to the least.

    Args:
        sensitivity: what `measure` found.
        size_budget_bytes: for the weights of all measured layers together (biases and scales
            come on top and do not depend on the widths).
        ratio: instead of it: how many times smaller than in float32 the weights shall be.
        objective: the harm of a layer: ``kl``, the increase of the ``loss`` over float's (a gain
            counts as one), or ``noise``, the output's noise-to-signal ratio. ``kl`` becomes
            ``noise`` where the model is no classifier.
        storage: what a weight takes: ``file``: as fxquant's files store it, in 2, 4 or 8
            bits, but for a byte a channel of weights whose zero points differ; ``bits``: its bits.
        fixed: widths that are given, by path.

    Raises:
        RecipeError: no budget or two, a budget that is too small (says the smallest possible
            one), an unknown path or width in `fixed`, or an objective that was not measured.
    """
    layers = sensitivity.of("weight")
    if not layers:
        raise RecipeError("the sensitivity holds no weights to choose bit widths for")
    budget = _budget(layers, size_budget_bytes, ratio)
    choices: list[list[tuple[int, int, float]]] = []
    fixed = fixed or {}
    for path in fixed:
        if path not in layers:
            raise RecipeError(f"fixed: no layer {path!r} was measured{nearest(path, layers)}")
    for path, effects in layers.items():
        widths = sorted(effects)
        if path in fixed:
            if fixed[path] not in effects:
                raise RecipeError(
                    f"fixed: {path} was not measured at {fixed[path]} bits, only at {widths}"
                )
            widths = [fixed[path]]
        choices.append(
            [
                (
                    width,
                    _bits_of(effects[width], storage),
                    _harm(effects[width], objective, sensitivity.float_loss),
                )
                for width in widths
            ]
        )
    smallest = sum(min(size for _, size, _ in options) for options in choices)
    if smallest > budget * 8:
        raise RecipeError(
            f"a budget of {budget:.0f} bytes is too small: the weights take at least "
            f"{math.ceil(smallest / 8)} bytes at the measured bit widths"
        )
    return dict(zip(layers, _solve(choices, int(budget * 8)), strict=True))


@checked()
def auto_recipe(recipe: Recipe, bits: Mapping[str, int], *, name: str = "") -> Recipe:
    """`recipe` with an override for each layer whose weight gets another bit width.

    The overrides come last, so that they win over those of the recipe.
    """
    overrides = [
        # A regular expression names the one module; a glob would name what is below it, too.
        Override(regex=re.escape(path), weights=(("bits", width),))
        for path, width in bits.items()
    ]
    return recipe.replace(
        {"name": name or f"{recipe.name}_auto", "overrides": [*recipe.overrides, *overrides]}
    )


def weight_bytes(
    sensitivity: Sensitivity, bits: Mapping[str, int], *, storage: Storage = "file"
) -> int:
    """The bytes that the measured layers' weights take at these bit widths."""
    layers = sensitivity.of("weight")
    return sum(
        math.ceil(_bits_of(layers[path][width], storage) / 8) for path, width in bits.items()
    )


def _budget(
    layers: Mapping[str, Mapping[int, Effect]], size: float | None, ratio: float | None
) -> float:
    if (size is None) == (ratio is None):
        raise RecipeError("give a size budget in bytes or a ratio, one of the two")
    if size is not None:
        if not size > 0:
            raise RecipeError(f"the size budget must be positive, got {size!r}")
        return size
    if ratio is None or not ratio > 0:
        raise RecipeError(f"the ratio to float32 must be positive, got {ratio!r}")
    return sum(4 * next(iter(effects.values())).values for effects in layers.values()) / ratio


def _bits_of(effect: Effect, storage: Storage) -> int:
    if storage == "bits":
        return effect.values * effect.bits
    # Codes that share a byte; an incomplete last one takes a whole byte.
    width = next((width for width in WIDTHS if effect.bits <= width), 8)
    return 8 * -(-effect.values * width // 8)


def _harm(effect: Effect, objective: Objective, float_loss: float | None) -> float:
    if objective == "loss":
        if effect.loss is None or float_loss is None:
            raise RecipeError(
                "objective 'loss' needs labels: measure the sensitivity on (inputs, labels)"
            )
        return effect.loss - float_loss
    if objective == "kl" and effect.kl is not None:
        return effect.kl
    if objective not in ("kl", "noise"):
        raise RecipeError(f"unknown objective {objective!r}: known are kl, loss, noise")
    return 10 ** (-effect.sqnr_db / 10)


def _solve(choices: list[list[tuple[int, int, float]]], budget: int) -> list[int]:
    """For each layer the width of the best choice; sizes and `budget` in bits."""
    # What the smallest choices take is spent anyway.
    bases = [min(size for _, size, _ in options) for options in choices]
    room = budget - sum(bases)
    extra = [
        [(width, size - base, harm) for width, size, harm in options]
        for options, base in zip(choices, bases, strict=True)
    ]
    most = sum(max(size for _, size, _ in options) for options in extra)
    room = min(room, most)
    unit = math.gcd(*(size for options in extra for _, size, _ in options)) or 1
    unit = max(unit, -(-room // _MOST_UNITS))
    cells = room // unit + 1
    harm = np.zeros(cells)  # the least harm of the layers so far, by what they may take
    taken = []
    for options in extra:
        best = np.full(cells, np.inf)
        choice = np.zeros(cells, dtype=np.int8)
        for index, (_, size, cost) in enumerate(options):
            units = -(-size // unit)
            if units >= cells:
                continue
            candidate = np.full(cells, np.inf)
            candidate[units:] = harm[: cells - units] + cost
            better = candidate < best
            best[better], choice[better] = candidate[better], index
        harm = best
        taken.append(choice)
    widths = []
    left = cells - 1
    for options, choice in zip(reversed(extra), reversed(taken), strict=True):
        width, size, _ = options[int(choice[left])]
        widths.append(width)
        left -= -(-size // unit)
    return widths[::-1]
