from __future__ import annotations

import itertools
import math

import pytest

from passes.ranges import intervals
from passes.ranges.intervals import UNBOUNDED, Interval

INF = math.inf
ENDS = [-INF, -2.0, -1.0, 0.0, 0.5, 3.0, INF]
SOME = [
    Interval(low, high, "some")
    for low, high in itertools.product(ENDS, ENDS)
    if low <= high and math.isfinite(min(abs(low), abs(high)))
]


def samples(interval: Interval) -> list[float]:
    low, high = max(interval.low, -100.0), min(interval.high, 100.0)
    return [low, high, (low + high) / 2, *[0.0] * (low <= 0 <= high)]


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        (intervals.add, lambda x, y: x + y),
        (intervals.multiply, lambda x, y: x * y),
        (intervals.divide, lambda x, y: x / y if y else None),
        (lambda a, b: intervals.hull("either", a, b), lambda x, y: x),
    ],
)
def test_results_of_elements_lie_in_the_result(operation, function) -> None:
    for a, b in itertools.product(SOME, SOME):
        found = operation(a, b)
        for x, y in itertools.product(samples(a), samples(b)):
            value = function(x, y)
            assert value is None or found.low - 1e-9 <= value <= found.high + 1e-9, (a, b)


def test_bounds_must_be_ordered_numbers() -> None:
    for low, high in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="no interval"):
            Interval(low, high)


def test_zero_times_an_unbounded_value_is_zero() -> None:
    found = intervals.multiply(Interval(0, 0), UNBOUNDED)
    assert (found.low, found.high) == (0, 0)


def test_opposite_infinities_are_unbounded() -> None:
    assert intervals.interval(math.nan, math.nan, "lost") == UNBOUNDED


def test_prints_as_mathematicians_write() -> None:
    assert str(Interval(0, 6)) == "[0, 6]"
    assert str(Interval(0, INF)) == "[0, ∞)"
    assert str(UNBOUNDED) == "(-∞, ∞)"
