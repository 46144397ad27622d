"""The drop of a metric between two models on the same samples, and how far chance may carry it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fxquant.errors import InputError

__all__ = ["Judged", "check_samples", "quantile", "samples_needed", "standard_error"]


@dataclass(frozen=True)
class Judged:
    """What a metric says of a model: one value, and the values that it is the mean of.

    `samples` is float64 [n], a value a sample, or a batch where the metric gives one a batch;
    `weights` [n] is how many samples each stands for. None where the metric is of all together.
    """

    value: float
    samples: Tensor | None = None
    weights: Tensor | None = None


def standard_error(reference: Judged, found: Judged) -> float | None:
    """Of the difference of two means over the same samples; None where samples have no values.

    The differences of the samples are independent, so that the error of their weighted mean d is
    √(Σ w²(dᵢ − d)²) / Σ w · √(n / (n − 1)). A metric that is right or wrong for a sample differs on
    few of them, on none perhaps: after Bonett and Price (2012), "Adjusted Wald confidence interval
    for a difference of binomial proportions based on paired data", a sample that is lost and one
    that is gained are counted besides.
    """
    before, after, weights = reference.samples, found.samples, found.weights
    if before is None or after is None or weights is None or len(before) != len(after):
        return None
    if len(before) < 2:
        return None
    differences = after - before
    step = _step(before, after)
    if step:
        differences = torch.cat([differences, differences.new_tensor([-step, step])])
        weights = torch.cat([weights, weights.new_ones(2)])
    count, total = len(differences), float(weights.sum())
    mean = float((differences * weights).sum()) / total
    squares = float((weights * (differences - mean)).square().sum())
    return math.sqrt(squares * count / (count - 1)) / total


def quantile(confidence: float) -> float:
    """So many standard errors lie between an estimate and its one-sided bound."""
    return NormalDist().inv_cdf(confidence)


def samples_needed(judged: Judged, most: float, confidence: float) -> float:
    """With how many samples `most` can be shown of a model that changes none of them.

    0 where the metric is not right or wrong for a sample, infinite where no number is enough.
    """
    step = 0.0 if judged.samples is None else _step(judged.samples)
    error = quantile(confidence) * step
    if not error or not most:
        return math.inf if error else 0
    # Of n samples and the two the error is step · √(2 / (n + 1) / (n + 2)).
    return math.ceil(math.sqrt(2 * (error / most) ** 2 + 0.25) - 1.5)


def check_samples(judged: Judged, most: float, confidence: float, name: str) -> None:
    """Raise InputError where even a model that changes nothing would not be let through.

    `name` is the metric's.
    """
    needed = samples_needed(judged, most, confidence)
    found = 0 if judged.samples is None else len(judged.samples)
    if needed > found:
        enough = f"give at least {needed:.0f}" if needed < math.inf else "no number of them can"
        raise InputError(
            f"{found} images cannot show that {name} drops by at most {most:.4g} with a "
            f"confidence of {confidence:.0%}: {enough}, allow a larger drop, or take it as it is "
            "measured (Drop(..., confidence=0.5))"
        )


def _step(*values: Tensor) -> float:
    """What a sample that is right is worth, where all others are worth 0; else 0."""
    worth = [value for value in set(torch.cat(values).tolist()) if value]
    return abs(worth[0]) if len(worth) == 1 else 0.0
