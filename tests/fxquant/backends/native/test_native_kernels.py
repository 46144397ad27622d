"""Every fast kernel gives the integers of `fxquant.integer`, whatever the shape."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fxquant import integer
from fxquant.backends.native.packing import (
    depthwise_lanes,
    pack_conv,
    pack_depthwise,
    pack_lanes,
    pad_outputs,
)
from fxquant.integer.rounding import channel_factors, rescale_factor
from tests.fxquant.backends.native.kernels import Image, call, compiler, instruction_sets

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
each_isa = pytest.mark.parametrize("isa", instruction_sets())
SCALE, ZERO_POINT = 0.05, 3
X_SCALE, X_ZERO_POINT = 0.02, 121
RESIDUAL = (0.03, 77)


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _table(draw: random.Random) -> Tensor | None:
    return _codes(256) if draw.random() < 0.3 else None


class _Layer:
    """A random layer: its weights, the reference's result, and what both kernels are told alike."""

    def __init__(self, draw: random.Random, x: Tensor, weight: Tensor, **geometry: object) -> None:
        outputs = weight.shape[0]
        self.weight = weight
        bias = torch.randint(-3000, 3000, (outputs,), dtype=torch.int32)
        scales = torch.rand(outputs) * 0.003 + 0.001
        self.lo, self.hi = draw.choice([(0, 255), (ZERO_POINT, 200)])
        self.table = _table(draw)
        plain = (x, X_SCALE, X_ZERO_POINT, weight, scales, None, bias)
        codes = (SCALE, ZERO_POINT, self.lo, self.hi, torch.uint8)
        shape = integer.conv(*plain, *geometry.values(), *codes).shape  # type: ignore[arg-type]
        self.residual = _codes(*shape) if draw.random() < 0.4 else None
        expected = integer.conv(
            *plain,
            *geometry.values(),  # type: ignore[arg-type]
            *codes,
            self.residual,
            *RESIDUAL,
        )
        self.expected = expected if self.table is None else self.table[expected.long()]
        total = weight.flatten(1).sum(1, dtype=torch.int32)
        self.bias = (bias - X_ZERO_POINT * total).to(torch.int32)
        self.multiplier = channel_factors(X_SCALE, scales, SCALE)

    def run(self, isa: str, function: str, draw: random.Random, **values: object) -> None:
        batch, _, height, width = self.expected.shape
        extra = draw.choice([0, 0, 5])
        y = Image(tuple(self.expected.shape), draw.choice([0, 1]), extra)  # type: ignore[arg-type]
        kept = None
        if self.residual is not None:
            kept = Image.of(self.residual, draw.choice([0, 1]), draw.choice([0, 3]))
            values |= {
                "residual": kept.address(),
                "residual_batch": kept.batch,
                "residual_row": kept.row,
                "residual_pixel": kept.pixel,
                "residual_zero_point": RESIDUAL[1],
                "residual_multiplier": float(rescale_factor(RESIDUAL[0], SCALE)),
            }
        call(
            isa,
            function,
            draw.choice([1, 2, 3]),
            **values,
            table=self.table,
            y=y.address(),
            y_batch=y.batch,
            y_row=y.row,
            y_pixel=y.pixel,
            batch=batch,
            height=height,
            width=width,
            zero_point=ZERO_POINT,
            lo=self.lo,
            hi=self.hi,
        )
        assert torch.equal(y.values, self.expected)
        assert y.untouched_elsewhere()


def _check_conv(isa: str, draw: random.Random) -> None:
    groups = draw.choice([1, 1, 1, 2, 3])
    channels, outputs = (groups * draw.randint(1, draw.choice([9, 70])) for _ in range(2))
    kernel = draw.choice([(1, 1), (1, 1), (3, 3), (draw.randint(1, 7), draw.randint(1, 7))])
    stride, dilation = (draw.randint(1, 2), draw.randint(1, 3)), (draw.randint(1, 2), 1)
    if draw.random() < 0.5:
        dilation = (1, 1)
    border = draw.randint(0, 3)
    size = [
        max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * border) + draw.randint(0, 14)
        for i in range(2)
    ]
    batch = draw.choice([0, 1, 1, 2, 5])
    x = _codes(batch, channels, *size)
    weight = torch.randint(-127, 128, (outputs, channels // groups, *kernel), dtype=torch.int8)
    geometry = {
        "stride": stride,
        "padding": (border, border),
        "dilation": dilation,
        "groups": groups,
    }
    layer = _Layer(draw, x, weight, **geometry)
    image = Image.of(x, border, draw.choice([0, 0, 1, -channels % 4]), X_ZERO_POINT)
    by_rows = groups == 1 and dilation == (1, 1) and image.pixel % 4 == 0
    packed = pack_conv(weight, groups, image.pixel if by_rows else None)
    offsets = [
        ky * dilation[0] * image.row + kx * image.pixel
        for ky in range(kernel[0])
        for kx in range(1 if by_rows else kernel[1])
    ]
    layer.run(
        isa,
        "conv",
        draw,
        x=image.address(-border, -border),
        segment_offset=torch.tensor(offsets, dtype=torch.int32),
        weight=packed,
        bias=pad_outputs(layer.bias, groups),
        multiplier=pad_outputs(layer.multiplier, groups),
        x_batch=image.batch,
        x_row=stride[0] * image.row,
        x_column=stride[1] * image.pixel,
        x_group=channels // groups,
        groups=groups,
        outputs=outputs // groups,
        segments=len(offsets),
        segment_quads=packed.shape[2] // len(offsets),
        by_panels=draw.randint(0, 1),
    )


@each_isa
def test_conv_of_any_shape_gives_the_reference_integers(isa: str) -> None:
    for seed in range(150):
        _check_conv(isa, random.Random(seed))


def _check_depthwise(isa: str, draw: random.Random) -> None:
    channels = draw.choice([draw.randint(1, 70), 16, 24, 32, 96, 144, 200])
    kernel = draw.choice([(3, 3), (5, 5), (7, 7), (draw.randint(1, 7), draw.randint(1, 7))])
    stride = draw.choice([(1, 1), (2, 2), (draw.randint(1, 2), draw.randint(1, 2))])
    border = draw.randint(0, 3)
    size = [max(1, kernel[i] - 2 * border) + draw.randint(0, 14) for i in range(2)]
    x = _codes(draw.choice([0, 1, 2]), channels, *size)
    weight = torch.randint(-127, 128, (channels, 1, *kernel), dtype=torch.int8)
    geometry = {
        "stride": stride,
        "padding": (border, border),
        "dilation": (1, 1),
        "groups": channels,
    }
    layer = _Layer(draw, x, weight, **geometry)
    image = Image.of(x, border, draw.choice([0, 3]), X_ZERO_POINT)
    layer.run(
        isa,
        "depthwise_conv",
        draw,
        x=image.address(-border, -border),
        weight=pack_depthwise(weight),
        bias=pack_lanes(layer.bias),
        multiplier=pack_lanes(layer.multiplier),
        x_batch=image.batch,
        x_row=image.row,
        x_pixel=image.pixel,
        channels=channels,
        kernel_height=kernel[0],
        kernel_width=kernel[1],
        stride_height=stride[0],
        stride_width=stride[1],
    )


@each_isa
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_sums_leave_as_floats(isa: str, stride: int) -> None:
    for channels, kernel in ((20, 3), (70, 5), (96, 7)):
        x = _codes(1, channels, 9, 9)
        weight = torch.randint(-127, 128, (channels, 1, kernel, kernel), dtype=torch.int8)
        scales, border = torch.rand(channels) * 0.01, kernel // 2
        geometry = ([stride] * 2, [border] * 2, [1, 1], channels)
        expected = integer.conv(
            *(x, X_SCALE, X_ZERO_POINT, weight, scales, None, None),
            *geometry,
            *(1.0, 0, 0, 0, torch.float32),
        )
        image = Image.of(x, border, 0, X_ZERO_POINT)
        y = expected.permute(0, 2, 3, 1).contiguous().zero_()
        total = weight.flatten(1).sum(1, dtype=torch.int32)
        call(
            isa,
            "depthwise_conv",
            x=image.address(-border, -border),
            weight=pack_depthwise(weight),
            bias=pack_lanes(-X_ZERO_POINT * total),
            multiplier=pack_lanes(channel_factors(X_SCALE, scales, None)),
            y=y,
            x_batch=image.batch,
            x_row=image.row,
            x_pixel=image.pixel,
            y_row=4 * channels * y.shape[2],
            y_pixel=4 * channels,
            batch=1,
            height=y.shape[1],
            width=y.shape[2],
            channels=channels,
            kernel_height=kernel,
            kernel_width=kernel,
            stride_height=stride,
            stride_width=stride,
            kind=2,
        )
        assert torch.equal(y.permute(0, 3, 1, 2), expected)


@each_isa
def test_depthwise_convolution_of_any_shape_gives_the_reference_integers(isa: str) -> None:
    for seed in range(120):
        _check_depthwise(isa, random.Random(seed))


def test_every_channel_has_a_lane_of_its_own() -> None:
    for channels in range(1, 200):
        lanes = depthwise_lanes(channels)
        assert lanes.unique().numel() == channels
