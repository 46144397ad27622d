"""What quantizing values costs: the sum of ``|x - Q(x)|^p`` for many ranges at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fxquant.simulate.observers.histogram import Histogram
from fxquant.simulate.observers.ranges import fit_codes
from fxquant.spec import QuantSpec

# Elements of a temporary: a chain of steps stays inside the cache, and below the size at which
# torch reduces in parallel. On a busy machine a thread that waits for another one of many small
# steps loses milliseconds, which is also why `round_`, parallel at any size, is spelled out below.
_CHUNK = 1 << 14


class Samples(Protocol):
    """Values of several rows, in a form whose quantization error can be computed."""

    def error(self, scale: Tensor, bottom: Tensor, top: Tensor, p: float) -> Tensor:
        """The sum of ``|x - Q(x)|^p``, float64 ``[C, K]``, for K quantizers of each of C rows.

        Args:
            scale: float64 ``[C, K]``.
            bottom: the least code less the zero point, float64 ``[C, K]``.
            top: the greatest code less the zero point.
            p: the exponent.
        """


class RawValues:
    """The values themselves, float32 ``[C, N]``."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def error(self, scale: Tensor, bottom: Tensor, top: Tensor, p: float) -> Tensor:
        """See `Samples.error`."""
        channels, columns = self.rows.shape
        total = torch.zeros_like(scale)
        inverse = scale.reciprocal().float()
        bottom, top = bottom.float(), top.float()
        row_step = max(1, _CHUNK // columns)
        for row in range(0, channels, row_step):
            part = slice(row, row + row_step)
            step = max(1, _CHUNK // (len(scale[part]) * columns))
            for column in range(0, columns, _CHUNK):
                x = self.rows[part, None, column : column + _CHUNK]
                for first in range(0, scale.shape[1], step):
                    k = slice(first, first + step)
                    u = x * inverse[part, k, None]
                    codes = _codes(u, bottom[part, k, None], top[part, k, None])
                    total[part, k] += _power(u.sub_(codes), p).sum(2)
        return total * scale**p


class Counts:
    """The counts of a histogram, whose values are taken to lie evenly inside their bins.

    With u = x / scale, q = clamp(round(u), bottom, top) and d = u - q, the integral of
    ``|u - q|^p`` from 0 to u is ``(2^-p q + sign(d) |d|^(p + 1)) / (p + 1)``, inside the range and
    beyond it. So the error of a bin is a difference of two values at its borders, however wide
    the bin is against a step of the codes.
    """

    def __init__(self, histogram: Histogram) -> None:
        counts, self.borders = histogram.occupied()
        widths = self.borders.diff(dim=1)
        density = torch.where(counts > 0, counts / widths, 0.0)
        zero = torch.zeros_like(density[:, :1])
        # Summation by parts: each border gets the drop in density from its left to its right.
        self.drops = torch.cat([zero, density], 1) - torch.cat([density, zero], 1)

    def error(self, scale: Tensor, bottom: Tensor, top: Tensor, p: float) -> Tensor:
        """See `Samples.error`."""
        channels, columns = self.borders.shape
        total = torch.zeros_like(scale)
        inverse = scale.reciprocal()
        row_step = max(1, _CHUNK // columns)
        for row in range(0, channels, row_step):
            part = slice(row, row + row_step)
            borders, drops = self.borders[part, None, :], self.drops[part, None, :]
            step = max(1, _CHUNK // (len(drops) * columns))
            for first in range(0, scale.shape[1], step):
                k = slice(first, first + step)
                d = borders * inverse[part, k, None]
                codes = _codes(d, bottom[part, k, None], top[part, k, None])
                d.sub_(codes)
                integral = _signed_power(d, p + 1).add_(codes, alpha=2.0**-p)
                total[part, k] = integral.mul_(drops).sum(2)
        return total.clamp(min=0) * scale ** (p + 1) / (p + 1)


def range_error(samples: Samples, spec: QuantSpec, low: Tensor, high: Tensor, p: float) -> Tensor:
    """The error of fitting a spec's codes to ranges, all float64 ``[C, K]``."""
    scale, zero_point = fit_codes(spec, low, high)
    return samples.error(scale, spec.fit_qmin - zero_point, spec.fit_qmax - zero_point, p)


def _codes(u: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """``round(clamp(u, bottom, top))``, half to even; the bounds are integers below 2^16."""
    # The sum has no bits left for a fraction, and rounding it to float rounds u.
    shift = 1.5 * 2.0 ** (52 if u.dtype == torch.float64 else 23)
    return torch.minimum(torch.maximum(u, bottom), top).add_(shift).sub_(shift)


def _power(d: Tensor, p: float) -> Tensor:
    if p == 2:
        return d.square_()
    return d.abs_() if p == 1 else d.abs_().pow_(p)


def _signed_power(d: Tensor, p: float) -> Tensor:
    if p == 3:
        return d * d * d
    return d.abs().pow_(p).copysign_(d)
