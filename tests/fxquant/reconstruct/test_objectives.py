from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.reconstruct.caches import Caches
from fxquant.reconstruct.objectives import (
    average_fisher,
    block_error,
    channel_dim,
    is_token_block,
    prediction_error,
    scaled_fisher,
    squared_gradient,
)
from fxquant.reconstruct.parallel import Share


def chain(*layers: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(*layers).eval())


def test_the_error_is_summed_over_channels_and_images_and_averaged_over_positions() -> None:
    y, target = torch.randn(3, 5, 4, 4), torch.randn(3, 5, 4, 4)
    expected = (y - target).square().sum(1).mean((1, 2)).sum()
    torch.testing.assert_close(block_error(y, target, 1), expected)
    tokens, goal = torch.randn(2, 7, 6), torch.randn(2, 7, 6)
    expected = (tokens - goal).square().sum(-1).mean(1).sum()
    torch.testing.assert_close(block_error(tokens, goal, 2), expected)


def test_channels_are_last_behind_a_linear_layer() -> None:
    linear, conv = chain(nn.Linear(4, 4), nn.ReLU()), chain(nn.Conv2d(3, 3, 1))
    assert channel_dim(linear, 3) == 2
    assert is_token_block(linear, 3)
    assert not is_token_block(linear, 2)
    assert channel_dim(conv, 4) == 1
    assert not is_token_block(conv, 4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equal_predictions_differ_by_nothing_and_others_by_something(temperature: float) -> None:
    logits, other = torch.randn(4, 10), torch.randn(4, 10)
    assert float(prediction_error(logits, logits, temperature)) == pytest.approx(0, abs=1e-5)
    p = F.softmax(other / temperature, -1)
    q = F.softmax(logits / temperature, -1)
    torch.testing.assert_close(
        prediction_error(logits, other, temperature), (p * (p / q).log()).sum()
    )


def test_the_prediction_of_a_map_is_one_for_each_position() -> None:
    logits, other = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    rows = [value.permute(0, 2, 3, 1).reshape(-1, 3) for value in (logits, other)]
    torch.testing.assert_close(
        prediction_error(logits, other, 1.0), prediction_error(rows[0], rows[1], 1.0)
    )


def test_fisher_weights_are_squared_gradients_of_each_image() -> None:
    rest = chain(nn.Linear(6, 3))
    y, target = torch.randn(4, 6), torch.randn(4, 3)
    together = squared_gradient(rest, y, 0, [], target)
    for image in range(4):
        one = slice(image, image + 1)
        alone = squared_gradient(rest, y[one], 0, [], target[one])
        torch.testing.assert_close(together[one], alone)


def test_weights_have_the_mean_one() -> None:
    squared = torch.rand(5, 3, 2) ** 4
    assert float(average_fisher(squared.sum(0, keepdim=True)).mean()) == pytest.approx(1)
    assert float(average_fisher(torch.zeros(1, 3)).mean()) == 1
    with Caches(2**20) as caches:
        rows = caches.make(5, 5, squared, "x")
        rows.write(0, squared)
        assert float(scaled_fisher(rows, 5, Share(), 2).tensor.mean()) == pytest.approx(1)


def test_an_outlier_channel_that_nobody_reads_weighs_less() -> None:
    class Rest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0] - x[:, 0].mean(-1, keepdim=True) + 0.0 * x[:, 1]

    rest = fx.symbolic_trace(Rest())
    y, target = torch.randn(8, 2, 4), torch.randn(8, 4)
    weights = average_fisher(squared_gradient(rest, y, 0, [], target).sum(0, keepdim=True))
    assert float(weights[0, 1].mean()) == pytest.approx(0.5)
    assert float(weights[0, 0].mean()) == pytest.approx(1.5)
