from __future__ import annotations

import pytest
import torch

import fxquant
from examples.landmarks.faces import LANDMARKS, OUTER_EYES, PUPILS, SIZE, draw
from examples.landmarks.network import WEIGHTS, LandmarkNet
from fxquant.errors import DataError
from fxquant.frontend.models import load_weights
from fxquant.metrics import normalized_mean_error


def test_the_error_is_a_share_of_the_distance_between_two_landmarks() -> None:
    target = torch.tensor([[0.0, 0.0, 4.0, 0.0, 2.0, 5.0]])
    found = target + torch.tensor([[0.0, 1.0, 0.0, -1.0, 1.0, 0.0]])
    # Each of the three is off by 1; the first two are 4 apart.
    assert normalized_mean_error(0, 1)(found, target).tolist() == [0.25]
    as_points = (value.view(1, 3, 2) for value in (found, target))
    assert normalized_mean_error(0, 1)(*as_points).tolist() == [0.25]


def test_landmarks_of_another_number_are_refused() -> None:
    with pytest.raises(DataError, match="K above 4"):
        normalized_mean_error(0, 4)(torch.zeros(1, 8), torch.zeros(1, 8))


def test_a_seed_is_a_face() -> None:
    (images, landmarks), (same, _), (others, _) = draw(2, 1), draw(2, 1), draw(2, 2)
    assert images.shape == (2, 3, SIZE, SIZE)
    assert landmarks.shape == (2, 2 * len(LANDMARKS))
    assert torch.equal(images, same)
    assert not torch.equal(images, others)


def test_pupils_are_darker_than_the_eyes_around_them() -> None:
    images, landmarks = draw(64, seed=3)
    places = ((landmarks.view(64, -1, 2) + 1) / 2 * SIZE).long().clamp(0, SIZE - 1)
    x, y = places[:, list(PUPILS)].unbind(-1)
    at_pupils = images.mean(1)[torch.arange(64)[:, None], y, x]
    lightest = torch.nn.functional.max_pool2d(images.mean(1, keepdim=True), 9, 1, 4)[:, 0]
    around = lightest[torch.arange(64)[:, None], y, x]
    assert float((at_pupils < around - 0.5).float().mean()) > 0.95


def test_eight_bits_find_the_landmarks_that_float_finds() -> None:
    model = LandmarkNet().eval()
    load_weights(model, WEIGHTS)
    images, landmarks = draw(100, seed=1_000_001)
    q = fxquant.compile(model, "w8a8", calibration=draw(64, seed=500_000)[0], target="reference")
    error = normalized_mean_error(*OUTER_EYES)
    with torch.inference_mode():
        in_float, in_integers = (error(each(images), landmarks).mean() for each in (model, q))
    assert float(in_float) < 0.05
    assert float(in_integers) < float(in_float) + 0.002
