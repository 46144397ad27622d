"""Elementwise kernels, pooling and quantizers give the integers of `fxquant.integer`."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant import integer
from fxquant.integer.rounding import float32_scalar, rescale_factor
from tests.fxquant.backends.native.kernels import Image, call, compiler, instruction_sets

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
each_isa = pytest.mark.parametrize("isa", instruction_sets())
A, B, Y = (0.02, 121), (0.03, 77), (0.05, 3)
CODES = (*Y, 0, 250, torch.uint8)
BOUNDS = {"zero_point": Y[1], "lo": 0, "hi": 250}


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _strides(name: str, image: Image) -> dict[str, int]:
    return {
        name: image.address(),
        f"{name}_batch": image.batch,
        f"{name}_row": image.row,
        f"{name}_pixel": image.pixel,
    }


def _image(draw: random.Random, values: Tensor) -> Image:
    return Image.of(values, draw.choice([0, 1]), draw.choice([0, 0, 5]))


def _run(isa: str, function: str, draw: random.Random, expected: Tensor, **values: object) -> None:
    """Call the kernel and compare; half of the time through a table."""
    table = None
    if function not in ("lookup", "max_pool", "quantize"):
        table = draw.choice([None, _codes(256)])
        values["table"] = table
    wanted = expected if table is None else table[expected.long()]
    y = _image(draw, torch.zeros_like(wanted))
    batch, channels, height, width = wanted.shape
    size = {"batch": batch, "channels": channels, "height": height, "width": width}
    call(isa, function, draw.choice([1, 2]), **_strides("y", y), **size, **values)
    assert torch.equal(y.values, wanted)
    assert y.untouched_elsewhere()


def _shape(draw: random.Random) -> tuple[int, int, int, int]:
    channels = draw.choice([1, 3, 16, 24, 64, 100])
    return draw.choice([0, 1, 3]), channels, draw.randint(1, 7), draw.randint(1, 9)


def _lookup(isa: str, draw: random.Random) -> None:
    x, table = _codes(*_shape(draw)), _codes(256)
    kept = _image(draw, x)
    _run(isa, "lookup", draw, integer.lookup(x, table), **_strides("x", kept), table=table)


def _add(isa: str, draw: random.Random) -> None:
    a = _codes(*_shape(draw))
    b = _codes(*a.shape)
    left, right = _image(draw, a), _image(draw, b)
    _run(
        isa,
        "add",
        draw,
        integer.add(a, *A, b, *B, *CODES),
        **_strides("a", left),
        **_strides("b", right),
        **BOUNDS,
        a_zero_point=A[1],
        b_zero_point=B[1],
        a_multiplier=float(rescale_factor(A[0], Y[0])),
        b_multiplier=float(rescale_factor(B[0], Y[0])),
    )


def _mul(isa: str, draw: random.Random) -> None:
    a = _codes(*_shape(draw))
    gate = draw.random() < 0.5
    b = _codes(*a.shape[:2], 1, 1) if gate else _codes(*a.shape)
    left, right = _image(draw, a), _image(draw, b)
    strides = _strides("b", right)
    if gate:
        strides |= {"b_row": 0, "b_pixel": 0}
    _run(
        isa,
        "mul",
        draw,
        integer.mul(a, *A, b, *B, *CODES),
        **_strides("a", left),
        **strides,
        **BOUNDS,
        a_zero_point=A[1],
        b_zero_point=B[1],
        multiplier=float(float32_scalar(A[0] * B[0] / Y[0])),
    )


def _channel_affine(isa: str, draw: random.Random) -> None:
    x = _codes(*_shape(draw))
    weight, bias = torch.randn(x.shape[1]) * 2, torch.randn(x.shape[1])
    kept = _image(draw, x)
    _run(
        isa,
        "channel_affine",
        draw,
        integer.channel_affine(x, *A, weight, bias, *CODES),
        **_strides("x", kept),
        **BOUNDS,
        x_zero_point=A[1],
        multiplier=(weight.double() * A[0] / Y[0]).float(),
        offset=(bias.double() / Y[0]).float(),
    )


def _ranges(size: int, outputs: int) -> list[list[int]]:
    return [[i * size // outputs, -((i + 1) * size // -outputs)] for i in range(outputs)]


def _avg_pool(isa: str, draw: random.Random) -> None:
    batch, channels, *_ = _shape(draw)
    height, width = draw.randint(1, 40), draw.randint(1, 40)
    x = _codes(batch, channels, height, width)
    size = draw.choice([(1, 1), (draw.randint(1, height), draw.randint(1, width))])
    rows = torch.tensor(_ranges(height, size[0]))
    columns = torch.tensor(_ranges(width, size[1]))
    count = (rows[:, 1] - rows[:, 0])[:, None] * (columns[:, 1] - columns[:, 0])
    kept = _image(draw, x)
    _run(
        isa,
        "avg_pool",
        draw,
        integer.adaptive_avg_pool(x, *A, size, *CODES),
        **_strides("x", kept),
        **BOUNDS,
        x_zero_point=A[1],
        row_range=rows.int().contiguous(),
        column_range=columns.int().contiguous(),
        multiplier=(A[0] / (count.double() * Y[0])).float().contiguous(),
    )


def _max_pool(isa: str, draw: random.Random) -> None:
    batch, channels, *_ = _shape(draw)
    kernel, stride, step = draw.randint(1, 3), draw.randint(1, 2), draw.randint(1, 2)
    pad = draw.randint(0, kernel // 2)
    size = [step * (kernel - 1) + 1 + draw.randint(0, 9) for _ in range(2)]
    x = _codes(batch, channels, *size)
    expected = integer.max_pool(x, [kernel] * 2, [stride] * 2, [pad] * 2, [step] * 2, False)
    ranges = []
    for length, outputs in zip(size, expected.shape[2:], strict=True):
        starts = [i * stride - pad for i in range(outputs)]
        # The first tap inside the image.
        inside = [start if start >= 0 else start % step for start in starts]
        stops = [min(start + step * (kernel - 1) + 1, length) for start in starts]
        ranges.append(torch.tensor([inside, stops], dtype=torch.int32).t().contiguous())
    kept = _image(draw, x)
    _run(
        isa,
        "max_pool",
        draw,
        expected,
        **_strides("x", kept),
        row_range=ranges[0],
        column_range=ranges[1],
        row_step=step,
        column_step=step,
    )


def _quantize(isa: str, draw: random.Random) -> None:
    batch, channels, height, width = _shape(draw)
    x = torch.randn(batch, channels, height, width) * 10
    if x.numel():
        x.view(-1)[0], x.view(-1)[-1] = float("nan"), float("inf")
    expected = integer.quantize(x, *CODES)
    fill = 4 if channels == 3 and draw.random() < 0.7 else channels
    if fill == channels and draw.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted = torch.zeros(batch, fill, height, width, dtype=torch.uint8)
    wanted[:, :channels] = expected
    y = Image(tuple(wanted.shape), 1, 0)  # type: ignore[arg-type]
    strides = dict(zip(("x_batch", "x_channel", "x_row", "x_column"), x.stride(), strict=True))
    call(
        isa,
        "quantize",
        draw.choice([1, 2]),
        x=x,
        **strides,
        **_strides("y", y),
        **BOUNDS,
        batch=batch,
        channels=channels,
        fill_channels=fill,
        height=height,
        width=width,
        inverse=float(float32_scalar(1.0) / float32_scalar(Y[0])),
    )
    assert torch.equal(y.values, wanted)
    assert y.untouched_elsewhere()


@each_isa
@pytest.mark.parametrize(
    "check", [_lookup, _add, _mul, _channel_affine, _avg_pool, _max_pool, _quantize]
)
def test_gives_the_reference_integers(
    isa: str, check: Callable[[str, random.Random], None]
) -> None:
    for seed in range(40):
        check(isa, random.Random(seed))
