"""Estimators that compare ranges by the error they cause: histogram, mse, p-norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from fxquant.simulate.observers.base import Observer
from fxquant.simulate.observers.error import Counts, RawValues, Samples, range_error
from fxquant.simulate.observers.histogram import Histogram
from fxquant.simulate.observers.tails import both_tails, is_one_dimensional, tail_bounds
from fxquant.spec import QuantSpec

_ROWS_AT_ONCE = 1 << 22  # values of a weight, or bins, that are worked on together
_WIDEST = 1.1  # of the full range, for weights
_SCATTER = 1 << 13  # values that the search for a matching scale looks at in each channel
# What may be cut of a range as rare. MobileNetV2 asks for the most: in its deep layers up to 17 %
# of the images, and in them up to 6e-4 of all values, lie beyond 1.75 times the mean extreme, and
# cutting them is worth 2.7 dB. Chosen on training images (250 to calibrate, 250 to measure).
_RARE_IMAGES = 0.2
_RARE_VALUES = 1e-3
_TRIMS = 4  # decades of tail mass that the histogram estimator may cut, 1e-5 to 1e-1


class HistogramObserver(Observer):
    """The base of estimators that look at the distribution.

    Activations stream through one `Histogram`. A weight is no stream: it is kept as it is until
    `range` looks at it, and its long channels are turned into histograms there, a few at a time.
    """

    def __init__(self, spec: QuantSpec, axis: int | None = None, name: str = "") -> None:
        super().__init__(spec, axis, name)
        self.bins = int(spec.option("bins"))
        self.histogram = Histogram(1, self.bins)
        self.parts: list[Tensor] = []
        self.cap = spec.option("cap") if spec.has_option("cap") else 0.0
        self._images: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def needs_samples(self) -> bool:
        """Whether ranges are capped by the mean extremes of the images."""
        return self.spec.kind == "activation" and self.cap > 0

    def observe_samples(self, low: Tensor, high: Tensor, source: int) -> None:
        """Keep the extremes of the images, apart for each tensor that shares the range."""
        self._images.setdefault(source, []).append((low.double(), high.double()))

    def limits(self) -> tuple[Tensor, Tensor]:
        """What was seen, 0 included, without what few images reach and few values are.

        A few images with values far beyond all others' stretch a range that is fitted to the sum
        of squared errors, at the cost of every other image. What lies beyond `cap` times the mean
        extreme of an image is cut, where at most a share `_RARE_IMAGES` of the images has such
        values and they are at most a share `_RARE_VALUES` of all. Tensors that share a range (the
        operands of a concatenation) are looked at one by one: the widest limit holds.
        """
        low, high = self.seen()
        low, high = low.clamp(max=0).clone(), high.clamp(min=0).clone()
        if not self._images:
            return low, high
        images = [
            tuple(map(torch.cat, zip(*parts, strict=True))) for parts in self._images.values()
        ]
        bottom = max(self._limit(-lows) for lows, _ in images)
        top = max(self._limit(highs) for _, highs in images)
        rare = torch.tensor([_RARE_VALUES], dtype=torch.float64)
        lower, upper = both_tails(self.histogram, rare)
        low = low.clamp(min=min(-bottom, float(lower)))
        high = high.clamp(max=max(top, float(upper)))
        return low, high

    def _limit(self, extremes: Tensor) -> float:
        """What few images of one tensor go beyond, from the largest value of each, ``[N]``."""
        extremes = extremes.clamp(min=0)
        may_exceed = int(_RARE_IMAGES * len(extremes))
        common = extremes.sort(descending=True).values[may_exceed]
        return max(float(self.cap * extremes.mean()), float(common))

    def observe(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Count the values, or keep them."""
        if self.spec.kind == "weight":
            self.parts.append(rows)
        else:
            self.histogram.update(rows, low, high)

    def histograms(self) -> Iterator[tuple[slice, Histogram]]:
        """Every channel's histogram, some channels at a time."""
        if self.spec.kind != "weight":
            yield slice(None), self.histogram
            return
        for part, rows in self.weights():
            yield part, self._count(rows, part)

    def weights(self) -> Iterator[tuple[slice, Tensor]]:
        """The kept values as ``[c, N]``, some channels at a time."""
        rows = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)
        step = max(1, _ROWS_AT_ONCE // max(rows.shape[1], self.bins))
        for first in range(0, len(rows), step):
            yield slice(first, first + step), rows[first : first + step]

    def samples(self) -> Iterator[tuple[slice, Samples]]:
        """What the error is computed from: the values of short channels, else histograms."""
        if self.spec.kind != "weight":
            yield slice(None), Counts(self.histogram)
            return
        for part, rows in self.weights():
            long = rows.shape[1] > self.bins
            yield part, Counts(self._count(rows, part)) if long else RawValues(rows)

    def _count(self, rows: Tensor, part: slice) -> Histogram:
        low, high = self.seen()
        # Thousands of channels, each of few values, need no fine bins.
        histogram = Histogram(len(rows), self.bins if len(low) == 1 else self.bins // 4)
        histogram.update(rows, low[part], high[part])
        return histogram


class NormObserver(HistogramObserver):
    """The range whose p-norm error is least (Nagel et al. 2020 use p = 2.4; MSE is p = 2).

    Symmetric and one-sided specs search one bound over `candidates` fractions of the largest
    magnitude; affine ones search both bounds, and with them range and zero point. Both go from
    coarse to fine and always compare the full range, so the result is never worse than min-max.
    """

    @property
    def p(self) -> float:
        """The exponent of the norm."""
        return 2.0 if self.spec.estimator == "mse" else self.spec.option("p")

    def range(self) -> tuple[Tensor, Tensor]:
        """The best range of each channel."""
        low, high = self.limits()
        candidates = int(self.spec.option("candidates"))
        for part, samples in self.samples():
            low[part], high[part] = search(
                samples, self.spec, low[part], high[part], p=self.p, candidates=candidates
            )
        return low, high


class L2HistogramObserver(HistogramObserver):
    """The range of least expected squared error among those that cut both tails alike.

    As torch's HistogramObserver does, candidates come from the distribution: each cuts the same
    share of the values, 0 to 10 %, off both ends, so an empty tail costs nothing. The best one is
    refined.
    """

    def range(self) -> tuple[Tensor, Tensor]:
        """The best range of each channel."""
        low, high = self.limits()
        count = int(self.spec.option("candidates"))
        count = count if len(low) == 1 else max(4, count // 4)
        shares = torch.cat([torch.zeros(1), torch.logspace(-1 - _TRIMS, -1, count - 1)]).double()
        for (part, histogram), (_, samples) in zip(self.histograms(), self.samples(), strict=True):
            lower, upper = tail_bounds(histogram, self.spec, shares)
            lower[:, 0], upper[:, 0] = low[part], high[part]
            limit_low, limit_high = low[part], high[part]
            if is_one_dimensional(self.spec):
                limit_high = torch.maximum(-limit_low, limit_high)
                limit_low = -limit_high
            lower = torch.maximum(lower, limit_low.unsqueeze(1))
            upper = torch.minimum(upper, limit_high.unsqueeze(1))
            best = pick(samples, self.spec, lower, upper, p=2.0)
            span = (high[part] - low[part]) / 16
            low[part], high[part] = refine(samples, self.spec, best, span, p=2.0)
        return low, high


def search(
    samples: Samples, spec: QuantSpec, low: Tensor, high: Tensor, *, p: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """The range inside ``[low, high]`` with the least p-norm error.

    Args:
        samples: the values of C rows.
        spec: the form of the codes.
        low: each row's lower limit, at most 0, float64 ``[C]``.
        high: each row's upper limit, at least 0.
        p: the exponent of the norm.
        candidates: how many ranges the coarse grid holds.

    Returns:
        Lower and upper bounds, float64 ``[C]``.
    """
    if is_one_dimensional(spec) or not bool((low < 0).any()):
        return _search_line(samples, spec, low, high, p=p, candidates=candidates)
    # A square of 1/3 as many steps a side costs more than a line, so it is refined more instead.
    side = max(3, round(math.sqrt(candidates) * (2 if len(low) == 1 else 0.8)))
    steps = torch.arange(side, -1, -1, dtype=torch.float64) / side
    grid = torch.cartesian_prod(steps, steps)[:-1]  # without the empty range
    best = pick(samples, spec, low.unsqueeze(1) * grid[:, 0], high.unsqueeze(1) * grid[:, 1], p=p)
    return refine(samples, spec, best, (high - low) / (2 * side), p=p)


def _search_line(
    samples: Samples, spec: QuantSpec, low: Tensor, high: Tensor, *, p: float, candidates: int
) -> tuple[Tensor, Tensor]:
    # Many rows: every fourth candidate first, then those around the best.
    stride = 1 if len(low) == 1 else 4
    limits = low.unsqueeze(1), high.unsqueeze(1)
    fractions = torch.arange(candidates, 0, -stride, dtype=torch.float64) / candidates
    best = _pick_fraction(samples, spec, limits, fractions.expand(len(low), -1), p)
    around = torch.arange(stride - 1, -stride, -1, dtype=torch.float64) / candidates
    between = torch.arange(7, -8, -2, dtype=torch.float64) / (8 * candidates)
    for offsets, limit in ((around, 1.0), (between, 1.0), (_scatter(samples), _WIDEST)):
        near = best.unsqueeze(1) + torch.cat([torch.zeros(1), offsets])
        near = near.clamp(0.25 / candidates, limit)
        best = _pick_fraction(samples, spec, limits, near, p)
    return low * best, high * best


def _scatter(samples: Samples) -> Tensor:
    # Few values, as in a depthwise kernel, can be met almost exactly by the right scale, often one
    # a little wider than their range: at 8 bits 3 dB for 9 values, 0.4 dB for 147.
    count = _SCATTER // samples.rows.shape[1] if isinstance(samples, RawValues) else 0
    return torch.linspace(0.1, -0.1, min(count, 512), dtype=torch.float64)


def _pick_fraction(
    samples: Samples, spec: QuantSpec, limits: tuple[Tensor, Tensor], fractions: Tensor, p: float
) -> Tensor:
    error = range_error(samples, spec, limits[0] * fractions, limits[1] * fractions, p)
    return fractions.gather(1, error.argmin(1, keepdim=True)).squeeze(1)


def refine(
    samples: Samples, spec: QuantSpec, best: tuple[Tensor, Tensor], span: Tensor, *, p: float
) -> tuple[Tensor, Tensor]:
    """Look closer around a range: five steps a bound, four times, each on half the scale.

    Args:
        samples: the values of C rows.
        spec: the form of the codes.
        best: lower and upper bounds to start from, float64 ``[C]``.
        span: how far around them to look at first.
        p: the exponent of the norm.
    """
    steps = (0.0, -1.0, -0.5, 0.5, 1.0)
    if is_one_dimensional(spec):
        moves = torch.tensor([(-step, step) for step in steps], dtype=torch.float64)
    else:
        moves = torch.tensor(list(product(steps, steps)), dtype=torch.float64)
    for level in range(4):
        reach = span.unsqueeze(1) / 2**level
        low = (best[0].unsqueeze(1) + reach * moves[:, 0]).clamp(max=0)
        high = (best[1].unsqueeze(1) + reach * moves[:, 1]).clamp(min=0)
        # A range that shrank to nothing would be taken for one of zeros; keep the start instead.
        empty = high == low
        low = torch.where(empty, best[0].unsqueeze(1), low)
        high = torch.where(empty, best[1].unsqueeze(1), high)
        best = pick(samples, spec, low, high, p=p)
    return best


def pick(
    samples: Samples, spec: QuantSpec, low: Tensor, high: Tensor, *, p: float
) -> tuple[Tensor, Tensor]:
    """The first best of K ranges ``[C, K]`` for each row, as float64 ``[C]`` bounds."""
    best = range_error(samples, spec, low, high, p).argmin(1, keepdim=True)
    return low.gather(1, best).squeeze(1), high.gather(1, best).squeeze(1)
