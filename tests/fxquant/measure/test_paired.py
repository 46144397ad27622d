"""The drop of a metric is known as well as the differences of its samples tell."""

import math

import pytest
import torch
from torch import Tensor

from fxquant.measure.paired import Judged, quantile, samples_needed, standard_error


def judged(samples: Tensor, weights: Tensor | None = None) -> Judged:
    weights = torch.ones_like(samples) if weights is None else weights
    return Judged(float((samples * weights).sum() / weights.sum()), samples, weights)


def right(count: int, of: int) -> Tensor:
    return 100.0 * (torch.arange(of, dtype=torch.float64) < count)


def test_what_both_models_have_in_common_is_no_error() -> None:
    before = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert standard_error(judged(before), judged(before + 1)) == pytest.approx(0, abs=1e-12)


def test_differences_have_the_error_of_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    expected = float((after - before).std()) / math.sqrt(50)
    assert standard_error(judged(before), judged(after)) == pytest.approx(expected)


def test_a_batch_that_stands_for_more_samples_counts_as_often() -> None:
    before = torch.zeros(3, dtype=torch.float64)
    after = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
    # The mean is 9/5, the differences from it are -4/5, 1/5 and 11/5.
    squares = (3 * 4 / 5) ** 2 + (1 / 5) ** 2 + (11 / 5) ** 2
    error = standard_error(judged(before, weights), judged(after, weights))
    assert error == pytest.approx(math.sqrt(squares * 3 / 2) / 5)


def test_two_samples_are_counted_besides_where_each_is_right_or_wrong() -> None:
    # Of 98 samples 3 are lost: with the two there are 100, 4 of them lost and 1 gained.
    error = standard_error(judged(right(60, 98)), judged(right(57, 98)))
    expected = 100 * math.sqrt((0.05 - 0.03**2) / 99)
    assert error == pytest.approx(expected)


def test_no_change_on_few_samples_is_no_proof() -> None:
    same = judged(right(32, 32))
    error = standard_error(same, same)
    assert error is not None
    assert quantile(0.95) * error > 5


@pytest.mark.parametrize("most", [0.5, 1.0, 5.0])
def test_so_many_samples_are_needed_and_no_fewer(most: float) -> None:
    needed = int(samples_needed(judged(right(5, 10)), most, 0.95))
    errors = [
        standard_error(judged(right(1, count)), judged(right(1, count)))
        for count in (needed, needed - 1)
    ]
    bounds = [quantile(0.95) * (error or 0) for error in errors]
    assert bounds[0] <= most < bounds[1]


def test_no_number_of_samples_shows_that_nothing_is_lost() -> None:
    assert samples_needed(judged(right(5, 10)), 0, 0.95) == math.inf
    assert samples_needed(judged(right(5, 10)), 0, 0.5) == 0


def test_a_metric_of_all_samples_together_has_no_error() -> None:
    assert standard_error(Judged(1.0), Judged(0.9)) is None
    assert samples_needed(Judged(1.0), 0.1, 0.95) == 0
