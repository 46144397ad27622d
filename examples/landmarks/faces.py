"""Faces that the code draws, with the places of their landmarks.

An ellipse with eyes, pupils, a nose and a mouth; size, place, turn, proportions, gaze, opened eyes
and mouth, colours, light from one side, a background and noise all differ. Edges are as soft as a
pixel, so that a landmark can be told more exactly than one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LANDMARKS", "OUTER_EYES", "PUPILS", "SIZE", "draw"]

SIZE = 64
LANDMARKS = (
    "left eye, outer",
    "left eye, inner",
    "right eye, inner",
    "right eye, outer",
    "left pupil",
    "right pupil",
    "nose",
    "mouth, left",
    "mouth, right",
    "mouth, top",
    "mouth, bottom",
    "chin",
)
OUTER_EYES, PUPILS = (0, 3), (4, 5)
"""The landmarks whose distance the error is divided by."""


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` faces, float32[N, 3, 64, 64] about in [-2, 2], and their landmarks.

    The landmarks are float32[N, 24]: x and y of each in turn, in [-1, 1] over the image.
    """
    chance = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        size = (count, *(shape or (1,)))
        return low + (high - low) * torch.rand(size, generator=chance)

    # In units of the face: its centre is (0, 0), its chin near (0, 1), y points down.
    apart, eye_y, eye_size = between(0.3, 0.42), between(-0.32, -0.12), between(0.13, 0.2)
    opened = eye_size * between(0.35, 0.8)
    gaze_x, gaze_y = between(-0.35, 0.35) * eye_size, between(-0.2, 0.2) * opened
    nose_x, nose_y = between(-0.05, 0.05), between(0.12, 0.3)
    mouth_y, mouth_width, lips = between(0.45, 0.62), between(0.2, 0.4), between(0.03, 0.17)
    mouth_x, chin = between(-0.04, 0.04), between(0.92, 1.05)
    zero = torch.zeros(count, 1)
    points = torch.stack(
        [
            torch.cat(values, 1)
            for values in (
                (-apart - eye_size, eye_y),
                (-apart + eye_size, eye_y),
                (apart - eye_size, eye_y),
                (apart + eye_size, eye_y),
                (-apart + gaze_x, eye_y + gaze_y),
                (apart + gaze_x, eye_y + gaze_y),
                (nose_x, nose_y),
                (mouth_x - mouth_width, mouth_y),
                (mouth_x + mouth_width, mouth_y),
                (mouth_x, mouth_y - lips),
                (mouth_x, mouth_y + lips),
                (zero, chin),
            )
        ],
        1,
    )
    scale, angle = between(0.5, 0.72), between(-0.45, 0.45)
    centre = between(-0.18, 0.18, 1, 2)
    cosine, sine = angle.cos(), angle.sin()
    turn = torch.stack([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)], 1)
    landmarks = points @ turn.transpose(1, 2) * scale[:, :, None] + centre

    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(1, -1, 2)
    x, y = ((grid - centre) @ turn / scale[:, :, None]).unbind(-1)
    pixel = 2 / SIZE / scale

    def ellipse(cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor) -> Tensor:
        radius = (((x - cx) / rx).square() + ((y - cy) / ry).square()).sqrt()
        return torch.sigmoid((1 - radius) * torch.minimum(rx, ry) / pixel * 4)[:, None]

    def colour(low: float, high: float) -> Tensor:
        return between(low, high, 3)[:, :, None]

    image = colour(0.1, 0.9) + colour(-0.25, 0.25) * grid[..., 0].view(1, 1, -1)
    skin = colour(0.35, 0.9)
    width = between(0.68, 0.82)

    def paint(mask: Tensor, paint_colour: Tensor) -> None:
        nonlocal image
        image = image * (1 - mask) + paint_colour * mask

    paint(ellipse(zero, zero, width, chin), skin)
    white = colour(0.8, 1.0)
    iris = colour(0.0, 0.35)
    for side in (-1, 1):
        eye = ellipse(side * apart, eye_y, eye_size, opened)
        paint(eye, white)
        pupil = ellipse(side * apart + gaze_x, eye_y + gaze_y, eye_size * 0.42, eye_size * 0.42)
        paint(pupil * eye, iris)
    paint(ellipse(nose_x, nose_y, zero + 0.07, zero + 0.05), skin * 0.6)
    paint(ellipse(mouth_x, mouth_y, mouth_width, lips), colour(0.3, 0.8) * skin)

    direction = between(-math.pi, math.pi)
    side = torch.cat([direction.cos(), direction.sin()], 1)[:, :, None]
    light = 1 + between(0, 0.45) * (grid @ side)[..., 0]
    noise = torch.randn(image.shape, generator=chance) * between(0, 0.08)[:, :, None]
    image = (image * light[:, None] + noise).clamp(0, 1)
    return ((image - 0.5) / 0.25).view(count, 3, SIZE, SIZE), landmarks.flatten(1)
