from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.simulate.observers.histogram import SMALLEST_EXPONENT, Histogram, needed_exponents


def counted(*chunks: Tensor, bins: int = 256) -> Histogram:
    histogram = Histogram(len(chunks[0]), bins)
    for chunk in chunks:
        rows = chunk.double()
        histogram.update(chunk, rows.amin(1), rows.amax(1))
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    return (
        torch.equal(a.counts, b.counts)
        and torch.equal(a.exponents, b.exponents)
        and torch.equal(a.minimum, b.minimum)
        and torch.equal(a.maximum, b.maximum)
    )


def by_hand(row: Tensor, exponent: int, bins: int) -> Tensor:
    index = torch.floor(row.double() / 2.0**exponent).long() + bins // 2
    return torch.bincount(index, minlength=bins)


MAGNITUDES = st.floats(2.0**-8, 2.0**20, width=32)
FLOATS = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda value: -value))


@given(values=st.lists(FLOATS, min_size=1, max_size=40), cut=st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_streaming_equals_one_shot(values: list[float], cut: int) -> None:
    x = torch.tensor([values])
    chunks = [chunk for chunk in (x[:, :cut], x[:, cut:]) if chunk.numel()]
    assert same(counted(x), counted(*chunks))
    assert same(counted(x), counted(*reversed(chunks)))


@given(values=st.lists(FLOATS, min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_counts_are_what_floor_says(values: list[float]) -> None:
    x = torch.tensor([values])
    histogram = counted(x)
    assert torch.equal(histogram.counts[0], by_hand(x[0], int(histogram.exponents), 256))
    assert int(histogram.counts.sum()) == len(values)


def test_merging_adds_exactly() -> None:
    a, b = torch.randn(3, 100) * 1e-3, torch.randn(3, 50) * torch.tensor([[1e-6], [1.0], [1e6]])
    merged = counted(a)
    merged.merge(counted(b))
    assert same(merged, counted(a, b))


def test_rows_are_independent() -> None:
    x = torch.randn(5, 70_000) * torch.tensor([1e-9, 1.0, 3.0, 0.0, 1e9]).unsqueeze(1)
    together = counted(x)
    for row in range(5):
        alone = counted(x[row : row + 1])
        assert torch.equal(together.counts[row], alone.counts[0])
        assert together.exponents[row] == alone.exponents[0]


def test_counts_without_negative_values_are_the_same() -> None:
    x = torch.rand(3, 1000) + torch.tensor([[0.0], [1.0], [5.0]])
    histogram = counted(x)
    for row in range(3):
        expected = by_hand(x[row], int(histogram.exponents[row]), 256)
        assert torch.equal(histogram.counts[row], expected)


@pytest.mark.parametrize(
    ("low", "high", "exponent"),
    [
        (0.0, 127.9, 0),
        (0.0, 128.0, 1),
        (-128.0, 0.0, 0),
        (-128.1, 0.0, 1),
        (0.0, 0.0, SMALLEST_EXPONENT),
        (-1e-44, 0.0, SMALLEST_EXPONENT),
    ],
)
def test_width_is_the_smallest_that_fits(low: float, high: float, exponent: int) -> None:
    bounds = torch.tensor([low]).double(), torch.tensor([high]).double()
    assert needed_exponents(*bounds, 256).tolist() == [exponent]


def test_values_just_below_a_border_stay_there() -> None:
    below = torch.nextafter(torch.tensor(4.0), torch.tensor(0.0))
    x = torch.stack([below, torch.tensor(100.0)]).expand(200, 2).contiguous()
    assert bool((counted(x).counts[:, 128 + 3] == 1).all())
    assert counted(-x[:1]).counts[0, 128 - 4] == 1


def test_huge_growth_keeps_signs_apart() -> None:
    histogram = counted(torch.tensor([[-1e-30, 1e-30, 2e-30]]), torch.tensor([[3e38]]))
    assert int(histogram.counts[0, :128].sum()) == 1
    assert int(histogram.counts[0, 128:].sum()) == 3


def test_occupied_borders_end_at_the_extremes() -> None:
    counts, borders = counted(torch.tensor([[-0.7, 0.3, 1.9]])).occupied()
    assert counts.sum() == 3
    assert borders[0, 0] == torch.tensor(-0.7)
    assert borders[0, -1] == torch.tensor(1.9)
    assert bool((borders.diff(dim=1) > 0).all())


def test_memory_is_constant() -> None:
    histogram = counted(*(torch.randn(1, 100) * 2.0**scale for scale in range(30)))
    assert histogram.counts.shape == (1, 256)
