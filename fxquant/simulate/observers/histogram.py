"""The streaming histogram that the searching estimators share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_EXPONENT = -120  # a bin's width 2^k; 2^120, by which values are divided, is float32
_CHUNK = 1 << 14  # values that are binned at once; see error.py
_MOST_COUNTS = 1 << 20  # bins of all rows that are counted at once


class Histogram:
    """Counts of values in bins of a power-of-two width, for each of several rows.

    Bin i of B holds ``[(i - B/2) w, (i + 1 - B/2) w)``. A row's width w = 2^k is the smallest at
    which its values fit. When one does not, neighbouring bins are added in pairs: that is exact,
    and since bins of all widths share their borders, the result does not depend on the order or
    on how the values were cut into batches; only a negative value below 2^-32 of the width may
    count as 0. Memory is constant.

    Args:
        rows: how many independent histograms.
        bins: how many bins each has, a power of two.
    """

    def __init__(self, rows: int = 1, bins: int = 4096) -> None:
        self.counts = torch.zeros(rows, bins, dtype=torch.int64)
        self.exponents = torch.full((rows,), SMALLEST_EXPONENT, dtype=torch.int64)
        self.minimum = torch.full((rows,), math.inf, dtype=torch.float64)
        self.maximum = torch.full((rows,), -math.inf, dtype=torch.float64)

    @property
    def bins(self) -> int:
        """How many bins a row has."""
        return self.counts.shape[1]

    @property
    def widths(self) -> Tensor:
        """The bins' widths, float64 ``[rows]``."""
        return torch.ldexp(torch.ones_like(self.minimum), self.exponents)

    def update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Count values.

        Args:
            x: finite float32 ``[rows, N]``.
            low: each row's smallest value, float64 ``[rows]``.
            high: each row's largest value.
        """
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)
        self._widen(needed_exponents(self.minimum, self.maximum, self.bins))
        rows, columns = x.shape
        inverse = torch.ldexp(torch.ones(rows), -self.exponents).unsqueeze(1)
        # Negative values are lifted above 0, where truncation is floor, and rows apart. In float32
        # that would round some over the border of their bin.
        negative = bool((low < 0).any())
        lifted = negative or rows > 1
        if lifted:
            inverse = inverse.double()
        middle = self.bins // 2 if negative else 0
        first = torch.arange(rows, dtype=inverse.dtype).unsqueeze(1) * self.bins + middle
        step_rows = max(1, min(_CHUNK // columns, _MOST_COUNTS // self.bins))
        for row in range(0, rows, step_rows):
            part = slice(row, row + step_rows)
            count = len(inverse[part])
            for column in range(0, columns, _CHUNK):
                scaled = x[part, column : column + _CHUNK].to(inverse.dtype) * inverse[part]
                if lifted:
                    scaled.add_(first[:count])
                found = torch.bincount(
                    scaled.to(torch.int32).flatten(), minlength=count * self.bins
                ).view(count, self.bins)
                if negative:
                    self.counts[part] += found
                else:
                    self.counts[part, self.bins // 2 :] += found[:, : self.bins // 2]

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram of as many rows and bins."""
        twin = other.copy()
        exponents = torch.maximum(self.exponents, twin.exponents)
        self._widen(exponents)
        twin._widen(exponents)
        self.counts += twin.counts
        self.minimum = torch.minimum(self.minimum, twin.minimum)
        self.maximum = torch.maximum(self.maximum, twin.maximum)

    def copy(self) -> Histogram:
        """An independent histogram of the same counts."""
        twin = Histogram(*self.counts.shape)
        twin.counts = self.counts.clone()
        twin.exponents = self.exponents
        twin.minimum, twin.maximum = self.minimum, self.maximum
        return twin

    def occupied(self) -> tuple[Tensor, Tensor]:
        """Counts and borders of the bins that hold anything in any row.

        The outermost borders are drawn in to the exact minimum and maximum, but for a sliver that
        keeps every bin that holds something wider than nothing.

        Returns:
            float64 ``[rows, n]`` counts and ``[rows, n + 1]`` borders, ascending.
        """
        used = self.counts.any(0).nonzero().flatten()
        first, last = int(used[0]), int(used[-1])
        counts = self.counts[:, first : last + 1].double()
        index = torch.arange(first, last + 2, dtype=torch.float64) - self.bins // 2
        width = self.widths
        sliver = width / 64
        low = torch.minimum(self.minimum, (torch.floor(self.minimum / width) + 1) * width - sliver)
        high = torch.maximum(self.maximum, torch.floor(self.maximum / width) * width + sliver)
        borders = (index * width.unsqueeze(1)).clamp(low.unsqueeze(1), high.unsqueeze(1))
        return counts, borders

    def _widen(self, exponents: Tensor) -> None:
        doublings = (exponents - self.exponents).clamp(min=0)
        if not bool(doublings.any()):
            return
        self.exponents = self.exponents + doublings
        for amount in sorted(set(doublings.tolist())):
            rows = (doublings == amount).nonzero().flatten()
            if amount == 0 or not bool(self.counts[rows].any()):
                continue
            self.counts[rows] = _merge_bins(self.counts[rows], amount)


def _merge_bins(counts: Tensor, doublings: int) -> Tensor:
    rows, bins = counts.shape
    # From bins/2 on everything non-negative lies in one bin and everything negative in another.
    group = 1 << min(doublings, bins.bit_length() - 2)
    merged = counts.view(rows, bins // group, group).sum(2)
    widened = torch.zeros_like(counts)
    start = (bins - bins // group) // 2
    widened[:, start : start + bins // group] = merged
    return widened


def needed_exponents(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The least k with ``-B/2 2^k <= low`` and ``high < B/2 2^k``, int64 of low's shape."""
    half = bins.bit_length() - 2
    _, above = torch.frexp(high.clamp(min=0))
    mantissa, below = torch.frexp((-low).clamp(min=0))
    # high = m 2^e with m in [1/2, 1) is below 2^e; -low may equal a power of two.
    below = below - (mantissa == 0.5).to(below.dtype)
    smallest = torch.full_like(above, SMALLEST_EXPONENT)
    above = torch.where(high > 0, above - half, smallest)
    below = torch.where(low < 0, below - half, smallest)
    return torch.maximum(above, below).clamp(min=SMALLEST_EXPONENT).long()
