from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.simulate.observers.ranges import qparams_from_range
from fxquant.spec import QParams, QuantSpec


def qparams(
    scale: float = 0.5, zero_point: int = 3, qmin: int = 0, qmax: int = 255, **more: Any
) -> QParams:
    return QParams(
        scale=torch.tensor([scale]),
        zero_point=torch.tensor([zero_point], dtype=torch.int32),
        qmin=qmin,
        qmax=qmax,
        dtype=more.pop("dtype", torch.uint8),
        **more,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "positive and finite"),
        ({"scale": float("nan")}, "positive and finite"),
        ({"zero_point": 256}, "lie outside"),
        ({"qmax": 256}, "do not fit"),
    ],
)
def test_refuses_parameters(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qparams(**changes)


def test_rounds_half_to_even_and_clamps() -> None:
    x = torch.tensor([0.25, 0.75, -0.25, 1000.0, -1000.0])
    assert qparams().quantize(x).tolist() == [3, 5, 3, 255, 0]


def test_multiplies_by_the_float32_reciprocal() -> None:
    parameters = qparams(scale=0.1, zero_point=0)
    x = torch.arange(0, 20, 0.05)
    inverse = torch.tensor(1.0) / torch.tensor(0.1)
    assert torch.equal(parameters.quantize(x), torch.round(x * inverse).to(torch.uint8))


def test_channels_lie_along_the_axis() -> None:
    scale = torch.tensor([0.5, 0.25, 2.0])
    zeros = torch.zeros(3, dtype=torch.int32)
    parameters = QParams(scale, zeros, -127, 127, torch.int8, axis=1)
    x = torch.randn(2, 3, 4)
    for channel in range(3):
        alone = QParams(scale[channel : channel + 1], zeros[:1], -127, 127, torch.int8)
        assert torch.equal(parameters.quantize(x)[:, channel], alone.quantize(x[:, channel]))
        assert torch.equal(
            parameters.fake_quantize(x)[:, channel], alone.fake_quantize(x[:, channel])
        )


SPECS = st.sampled_from(
    [
        QuantSpec(bits=bits, scheme=scheme, one_sided=one_sided)
        for bits, scheme, one_sided in (
            (8, "affine", False),
            (8, "symmetric", False),
            (8, "affine", True),
            (4, "affine", False),
            (3, "affine", True),
            (2, "symmetric", False),
            (16, "symmetric", False),
        )
    ]
    + [
        QuantSpec(bits=bits, scheme=scheme, kind="weight")
        for bits in (8, 4, 2)
        for scheme in ("symmetric", "affine")
    ]
)
BOUNDS = st.floats(2.0**-40, 2.0**40, width=32)


@given(spec=SPECS, below=BOUNDS, above=BOUNDS)
@settings(max_examples=200, deadline=None)
def test_quantization_is_a_projection_that_keeps_zero(
    spec: QuantSpec, below: float, above: float
) -> None:
    below = 0.0 if spec.one_sided else below
    parameters = qparams_from_range(spec, *(torch.tensor([v]).double() for v in (-below, above)))
    x = torch.linspace(-below, above, 301)
    q = parameters.quantize(x)
    y = parameters.dequantize(q)
    assert torch.equal(parameters.quantize(y), q)
    assert torch.equal(parameters.fake_quantize(x), y)
    assert parameters.quantize(torch.zeros(1)).item() == parameters.zero_point.item()
    assert parameters.fake_quantize(torch.zeros(1)).item() == 0.0
    # Half a step, and what float32 loses in x / s, which counts up to 32,767 steps.
    half = parameters.scale.item() * (0.5 + 32767 * 2.0**-22)
    assert float((y.double() - x.double()).abs().max()) <= half
