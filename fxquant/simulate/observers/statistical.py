"""Estimators that look at the distribution alone: percentile and entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.simulate.observers.histogram import Histogram
from fxquant.simulate.observers.ranges import fit_codes
from fxquant.simulate.observers.search import HistogramObserver
from fxquant.simulate.observers.tails import is_one_dimensional, tail_bounds
from fxquant.spec import QuantSpec


class PercentileObserver(HistogramObserver):
    """The range that leaves out a share of the values: ``percentile = 99.99`` drops 0.01 %.

    Affine specs drop that share at each end, symmetric and one-sided ones of the magnitudes.
    """

    def range(self) -> tuple[Tensor, Tensor]:
        """The quantiles of each channel, inside its exact extremes."""
        low, high = self.seen()
        low, high = low.clamp(max=0).clone(), high.clamp(min=0).clone()
        share = torch.tensor([1 - self.spec.option("percentile") / 100], dtype=torch.float64)
        for part, histogram in self.histograms():
            lower, upper = tail_bounds(histogram, self.spec, share)
            limit = torch.maximum(-low[part], high[part])
            one_dimensional = is_one_dimensional(self.spec)
            low[part] = torch.maximum(lower[:, 0], -limit if one_dimensional else low[part])
            high[part] = torch.minimum(upper[:, 0], limit if one_dimensional else high[part])
        return low, high


class EntropyObserver(HistogramObserver):
    """The range whose quantized distribution diverges least from the original (Migacz 2017).

    The Kullback-Leibler divergence of P, the histogram with what lies outside moved to the
    outermost bins inside, from Q, the histogram inside spread evenly over the bins that share a
    code. Candidates are fractions of the full range. Those that span fewer bins than there are
    codes, and those that leave out more values than an even share of one code, are not compared:
    where there are few values, a narrow range can look like a perfect match. The bin at 0 counts
    as its larger neighbour, since the many exact zeros behind a ReLU would decide alone.
    """

    def range(self) -> tuple[Tensor, Tensor]:
        """The best range of each channel."""
        low, high = self.seen()
        low, high = low.clamp(max=0).clone(), high.clamp(min=0).clone()
        if self.spec.fit_qmax - self.spec.fit_qmin + 1 > self.bins:
            return low, high  # more codes than bins: no range can be told from another
        candidates = int(self.spec.option("candidates"))
        stride = 1 if len(low) == 1 else 4
        coarse = torch.arange(candidates, 0, -stride, dtype=torch.float64) / candidates
        near = torch.arange(stride - 1, -stride, -1, dtype=torch.float64) / candidates
        for part, histogram in self.histograms():
            divergence = _Divergence(histogram, self.spec, low[part], high[part])
            best = divergence.least(coarse.expand(len(low[part]), -1))
            if stride > 1:
                best = divergence.least((best.unsqueeze(1) + near).clamp(1 / candidates, 1.0))
            low[part], high[part] = low[part] * best, high[part] * best
        return low, high


class _Divergence:
    """KL(P || Q) for fractions of each row's range.

    Codes take up runs of neighbouring bins, so sums over the bins of a code are differences of
    running sums, and a candidate costs as much as there are codes, not bins.
    """

    def __init__(self, histogram: Histogram, spec: QuantSpec, low: Tensor, high: Tensor) -> None:
        self.spec, self.low, self.high = spec, low, high
        self.bins, self.widths = histogram.bins, histogram.widths.unsqueeze(1)
        self.counts = _without_spike(histogram.counts.double())
        self.mass = _running(self.counts)
        self.holding = _running((self.counts > 0).double())
        self.entropy = _running(_times_log(self.counts, self.counts))

    def least(self, fractions: Tensor) -> Tensor:
        """The fraction of least divergence in each row of float64 ``[C, K]``."""
        divergence = torch.stack([self._of(fraction) for fraction in fractions.unbind(1)], 1)
        return fractions.gather(1, divergence.argmin(1, keepdim=True)).squeeze(1)

    def _of(self, fraction: Tensor) -> Tensor:
        spec = self.spec
        scale, zero_point = fit_codes(spec, self.low * fraction, self.high * fraction)
        codes = torch.arange(spec.fit_qmin, spec.fit_qmax + 2, dtype=torch.float64) - 0.5
        borders = (codes - zero_point.unsqueeze(1)) * scale.unsqueeze(1)
        # The bins whose centers lie below a border.
        index = torch.ceil(borders / self.widths + (self.bins / 2 - 0.5))
        index = index.clamp(0, self.bins).long()
        total = self.mass[:, -1]
        below, above = self.mass.gather(1, index[:, :1]), self.mass.gather(1, index[:, -1:])
        kept = (above - below).squeeze(1)
        mass = self.mass.gather(1, index).diff(dim=1)
        holding = self.holding.gather(1, index).diff(dim=1)
        level = _times_log(torch.ones_like(mass), mass / holding.clamp(min=1))
        cross = (mass * level).sum(1)
        entropy = self.entropy.gather(1, index[:, -1:]) - self.entropy.gather(1, index[:, :1])
        entropy = entropy.squeeze(1)
        # What lies outside joins the outermost bin, and code, inside that hold something.
        first = torch.searchsorted(self.mass, below, right=True) - 1
        last = torch.searchsorted(self.mass, above) - 1
        filled = mass > 0
        for outside, bin_, code in (
            (below.squeeze(1), first, filled.double().argmax(1, keepdim=True)),
            (total - above.squeeze(1), last, _last_true(filled)),
        ):
            held = self.counts.gather(1, bin_.clamp(0, self.bins - 1)).squeeze(1)
            together = held + outside
            entropy = entropy + _times_log(together, together) - _times_log(held, held)
            cross = cross + outside * level.gather(1, code).squeeze(1)
        kl = (entropy - cross) / total - total.log() + kept.clamp(min=1).log()
        spanned = (self.high - self.low) * fraction / self.widths.squeeze(1)
        enough = (spanned >= mass.shape[1]) & (total - kept <= total / mass.shape[1])
        return torch.where((fraction >= 1) | enough, kl, torch.inf)


def _running(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _times_log(factor: Tensor, x: Tensor) -> Tensor:
    """factor * log(x), and 0 where x is 0."""
    return torch.where(x > 0, factor * x.clamp(min=1e-300).log(), 0.0)


def _last_true(mask: Tensor) -> Tensor:
    return mask.shape[1] - 1 - mask.flip(1).double().argmax(1, keepdim=True)


def _without_spike(counts: Tensor) -> Tensor:
    zero = counts.shape[1] // 2
    neighbours = torch.maximum(counts[:, zero - 1], counts[:, zero + 1])
    counts[:, zero] = torch.where(
        neighbours > 0, torch.minimum(counts[:, zero], neighbours), counts[:, zero]
    )
    return counts
