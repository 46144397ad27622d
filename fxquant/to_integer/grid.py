"""What the integers of a value mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """What the integers of a value mean: ``x = scale · (q − zero_point)``."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: torch.dtype

    def output(self, low: int | None = None, high: int | None = None) -> tuple[Any, ...]:
        """The trailing arguments of an operator that writes this grid, clamped further."""
        qmin = self.qmin if low is None else max(self.qmin, low)
        qmax = self.qmax if high is None else min(self.qmax, high)
        return (self.scale, self.zero_point, qmin, qmax, self.dtype)

    def code(self, value: float) -> int:
        """The code of a real `value`, rounded as quantize rounds."""
        return round(value / self.scale) + self.zero_point

    @property
    def input(self) -> tuple[float, int]:
        """The scale and zero point as operators take them."""
        return (self.scale, self.zero_point)
