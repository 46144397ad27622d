"""Estimators that only follow the extremes: (moving-average) abs-max and min-max."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.simulate.observers.base import Observer
from fxquant.spec import QuantSpec


class MinMaxObserver(Observer):
    """The range from the smallest to the largest value seen."""

    def observe(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """The base class follows the extremes already."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The extremes."""
        return self.seen()


class AbsMaxObserver(MinMaxObserver):
    """The range ``[-a, a]``, a the largest magnitude seen; ``[0, a]`` where one-sided."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The range of the largest magnitude."""
        return mirrored(self.spec, *self.seen())


class MovingAverageMinMaxObserver(Observer):
    """Exponential moving averages of each batch's extremes (Jacob et al. 2018, section 3.1).

    ``r <- momentum * r + (1 - momentum) * batch``, started from the first batch. The only
    estimator, with its abs-max sibling, that depends on how the values are cut into batches.
    """

    def __init__(self, spec: QuantSpec, axis: int | None = None, name: str = "") -> None:
        super().__init__(spec, axis, name)
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def observe(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Move the averages towards a batch's extremes."""
        low, high = self.batch_range(low, high)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            weight = 1 - self.spec.option("momentum")
            self.low = torch.lerp(self.low, low, weight)
            self.high = torch.lerp(self.high, high, weight)

    def range(self) -> tuple[Tensor, Tensor]:
        """The averages."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def batch_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """What a batch adds to the averages."""
        return low, high


class MovingAverageAbsMaxObserver(MovingAverageMinMaxObserver):
    """The range ``[-a, a]``, a the moving average of each batch's largest magnitude."""

    def batch_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range of the batch's largest magnitude."""
        bound = torch.maximum(-low, high)
        return -bound, bound


def mirrored(spec: QuantSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``[-a, a]`` around the larger magnitude; the lower bound is 0 where one-sided."""
    bound = torch.maximum(-low, high)
    return torch.zeros_like(bound) if spec.one_sided else -bound, bound
