"""Ranges that leave out a given share of the values at their ends."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.simulate.observers.histogram import Histogram
from fxquant.spec import QuantSpec


def is_one_dimensional(spec: QuantSpec) -> bool:
    """Whether a spec's range has only one bound to find."""
    return spec.one_sided or spec.scheme == "symmetric"


def tail_bounds(histogram: Histogram, spec: QuantSpec, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges that leave out a share of the values at each end.

    One-dimensional specs get ``[-b, b]`` that leaves out a share of the magnitudes. Inside a bin
    values are taken to lie evenly. Every range holds 0.

    Args:
        histogram: of C rows.
        spec: the form of the codes.
        shares: float64 ``[K]``, 0 to 1.

    Returns:
        Bounds, float64 ``[C, K]``.
    """
    if is_one_dimensional(spec):
        high = _quantiles(*_magnitudes(histogram), 1 - shares)
        return -high, high
    return both_tails(histogram, shares)


def both_tails(histogram: Histogram, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges that leave out a share of the values below and as many above; every one holds 0."""
    counts, borders = histogram.occupied()
    return (
        _quantiles(counts, borders, shares).clamp(max=0),
        _quantiles(counts, borders, 1 - shares).clamp(min=0),
    )


def _magnitudes(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """Counts and borders of |x|: bin -1 - i mirrors bin i."""
    half = histogram.bins // 2
    counts = histogram.counts[:, half:] + histogram.counts[:, :half].flip(1)
    borders = torch.arange(half + 1, dtype=torch.float64) * histogram.widths.unsqueeze(1)
    largest = torch.maximum(-histogram.minimum, histogram.maximum)
    return counts.double(), torch.minimum(borders, largest.unsqueeze(1))


def _quantiles(counts: Tensor, borders: Tensor, shares: Tensor) -> Tensor:
    total = counts.cumsum(1)
    wanted = shares.expand(len(counts), -1) * total[:, -1:]
    index = torch.searchsorted(total, wanted).clamp(max=counts.shape[1] - 1)
    before = total.gather(1, index) - counts.gather(1, index)
    inside = (wanted - before) / counts.gather(1, index).clamp(min=1)
    left, right = borders.gather(1, index), borders.gather(1, index + 1)
    return left + inside.clamp(0, 1) * (right - left)
