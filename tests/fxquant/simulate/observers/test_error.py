from __future__ import annotations

import pytest
import torch

from fxquant.simulate.observers.error import Counts, RawValues, range_error
from fxquant.simulate.observers.histogram import Histogram
from fxquant.simulate.observers.ranges import qparams_from_range
from fxquant.spec import QuantSpec

SPECS = [
    QuantSpec(bits=8),
    QuantSpec(bits=4),
    QuantSpec(bits=4, scheme="symmetric", kind="weight"),
    QuantSpec(bits=3, scheme="affine", kind="weight"),
    QuantSpec(bits=8, reduce_range=True),
]


def counts_of(x: torch.Tensor, bins: int = 4096) -> Counts:
    histogram = Histogram(len(x), bins)
    histogram.update(x, x.double().amin(1), x.double().amax(1))
    return Counts(histogram)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
def test_error_of_values_is_that_of_the_quantizer(spec: QuantSpec, p: float) -> None:
    x = torch.randn(3, 500)
    low = torch.tensor([[-1.0, -3.0]]).expand(3, -1).double()
    high = torch.tensor([[2.0, 3.5]]).expand(3, -1).double()
    error = range_error(RawValues(x), spec, low, high, p)
    for column in range(2):
        parameters = qparams_from_range(spec, low[:1, column], high[:1, column])
        # Clipping is judged by the codes that the range was fitted to.
        codes = parameters.quantize(x).clamp(max=spec.fit_qmax)
        expected = (x - parameters.dequantize(codes)).double().abs().pow(p).sum(1)
        torch.testing.assert_close(error[:, column], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4, 3.7])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_of_counts_integrates_over_each_bin(p: float, bits: int) -> None:
    spec = QuantSpec(bits=bits)
    x = torch.tensor([[-1.3, -0.2, 0.01, 0.4, 0.45, 2.2]])
    histogram = Histogram(1, 256)
    histogram.update(x, x.double().amin(1), x.double().amax(1))
    counts, borders = histogram.occupied()
    low, high = torch.tensor([[-0.8]]).double(), torch.tensor([[1.7]]).double()
    # A Riemann sum of 2,000 points a bin; the integrand is steep where p < 1 only.
    inside = (torch.arange(2000).double() + 0.5) / 2000
    points = borders[:, :-1, None] + inside * borders.diff(dim=1).unsqueeze(2)
    parameters = qparams_from_range(spec, low[0], high[0])
    scale, zero = parameters.scale.double(), parameters.zero_point
    codes = (torch.round(points / scale) + zero).clamp(parameters.qmin, parameters.qmax)
    errors = (points - (codes - zero) * scale).abs().pow(p).mean(2)
    expected = (counts * errors).sum()
    got = range_error(Counts(histogram), spec, low, high, p)[0, 0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_counts_agree_with_values(spec: QuantSpec) -> None:
    x = torch.randn(2, 100_000)
    fractions = torch.tensor([[0.2, 0.5, 1.0]]).double()
    low, high = x.double().amin(1, keepdim=True), x.double().amax(1, keepdim=True)
    from_counts = range_error(counts_of(x), spec, low * fractions, high * fractions, 2.0)
    from_values = range_error(RawValues(x), spec, low * fractions, high * fractions, 2.0)
    torch.testing.assert_close(from_counts, from_values, rtol=0.01, atol=0)


def test_many_candidates_equal_one_at_a_time() -> None:
    # Long enough that rows, columns and candidates are all cut into chunks.
    x = torch.randn(3, 40_000)
    spec = QuantSpec(bits=4)
    bounds = torch.linspace(0.5, 4, 7).double().expand(3, -1)
    for samples in (RawValues(x), counts_of(x)):
        together = range_error(samples, spec, -bounds, bounds, 2.0)
        for k in range(7):
            part = bounds[:, k : k + 1]
            alone = range_error(samples, spec, -part, part, 2.0)
            torch.testing.assert_close(together[:, k : k + 1], alone, rtol=1e-9, atol=0)
