"""Images that need no file: ten kinds of shapes and textures, drawn with seeded noise.

Every image has a random foreground and background color, position, size, rotation, a fainter
distracting blob and pixel noise, so that a small network reaches neither 100 % nor chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SIDE = 32
NOISE = 0.42

Field = Tensor
"""float[N, SIDE, SIDE]: a coordinate, or how deep each pixel lies inside of a shape."""


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` images f32[N,3,32,32] of mean about 0 and their classes int64[N].

    The same seed draws the same images. Classes follow in turn, so any count is balanced.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    labels = torch.arange(count) % len(CLASSES)
    x, y = _rotated_grid(
        uniform(-0.35, 0.35, 2, 1, 1), uniform(-0.3, 0.3, 1, 1), uniform(0.4, 0.75, 1, 1)
    )
    depth = torch.empty_like(x)
    for label, shape in enumerate(CLASSES.values()):
        drawn = labels == label
        depth[drawn] = shape(x[drawn], y[drawn])
    inside = torch.sigmoid(depth * 12)

    blob_x, blob_y = _rotated_grid(
        uniform(-0.9, 0.9, 2, 1, 1), torch.zeros(count, 1, 1), uniform(0.15, 0.35, 1, 1)
    )
    blob = 0.5 * torch.sigmoid((1 - blob_x.square() - blob_y.square()) * 6)

    background, foreground = uniform(-0.5, 0.5, 3, 1, 1), uniform(-1, 1, 3, 1, 1)
    # A foreground of the background's color would be no image of anything.
    contrast = foreground - background
    contrast = (
        contrast / contrast.square().mean(1, keepdim=True).sqrt() * uniform(0.4, 1.2, 1, 1, 1)
    )
    images = background + contrast * inside.unsqueeze(1)
    images += uniform(-0.6, 0.6, 3, 1, 1) * blob.unsqueeze(1)
    images += NOISE * torch.randn(count, 3, SIDE, SIDE, generator=random)
    return images, labels


def _rotated_grid(center: Tensor, angle: Tensor, size: Tensor) -> tuple[Field, Field]:
    """Coordinates (x, y) in which a shape of the given center, angle and size is the unit one."""
    line = torch.linspace(-1, 1, SIDE)
    x = line.reshape(1, 1, SIDE) - center[:, 0]
    y = line.reshape(1, SIDE, 1) - center[:, 1]
    cosine, sine = angle.cos(), angle.sin()
    return (cosine * x + sine * y) / size, (cosine * y - sine * x) / size


def _disk(x: Field, y: Field) -> Field:
    return 0.9 - (x.square() + y.square()).sqrt()


def _ring(x: Field, y: Field) -> Field:
    return 0.22 - ((x.square() + y.square()).sqrt() - 0.7).abs()


def _square(x: Field, y: Field) -> Field:
    return 0.8 - torch.maximum(x.abs(), y.abs())


def _frame(x: Field, y: Field) -> Field:
    return 0.2 - (torch.maximum(x.abs(), y.abs()) - 0.65).abs()


def _triangle(x: Field, y: Field) -> Field:
    return torch.minimum(0.6 - y, y + 0.9 - 1.6 * x.abs())


def _cross(x: Field, y: Field) -> Field:
    bars = torch.maximum(0.25 - x.abs(), 0.25 - y.abs())
    return torch.minimum(bars, 0.9 - torch.maximum(x.abs(), y.abs()))


def _stripes(x: Field, y: Field) -> Field:
    return 0.3 * torch.sin(2 * math.pi * y) + 0 * x


def _diagonal_stripes(x: Field, y: Field) -> Field:
    return 0.3 * torch.sin(math.sqrt(2) * math.pi * (x + y))


def _checkerboard(x: Field, y: Field) -> Field:
    return 0.4 * torch.sin(math.pi * 1.3 * x) * torch.sin(math.pi * 1.3 * y)


def _dots(x: Field, y: Field) -> Field:
    return 0.3 * (torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y) - 0.9)


CLASSES: dict[str, Callable[[Field, Field], Field]] = {
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "cross": _cross,
    "stripes": _stripes,
    "diagonal stripes": _diagonal_stripes,
    "checkerboard": _checkerboard,
    "dots": _dots,
}
"""Class name → the shape's depth at each pixel: positive inside, negative outside."""
