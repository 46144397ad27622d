from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant import integer
from fxquant.errors import CompileError
from tests.fxquant.integer import plain

BOUNDED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def geometry(spatial: int, **changes: Any) -> dict[str, Any]:
    base = {"stride": [1] * spatial, "padding": [0] * spatial, "dilation": [1] * spatial}
    return {**base, "groups": 1, **changes}


def run_conv(x: torch.Tensor, weight: torch.Tensor, geo: dict[str, Any], **changes: Any) -> Any:
    """The operator's codes, and the plain ones."""
    outputs = weight.shape[0]
    zero_point, bias = 117, torch.randint(-9999, 9999, (outputs,), dtype=torch.int32)
    bias = changes.get("bias", bias)
    scale = plain.scales(changes.get("scales", outputs))
    weight_zero_point = changes.get("weight_zero_point")
    output = {"scale": 0.31, "zero_point": 120, "qmin": 0, "qmax": 255, "dtype": torch.uint8}
    output.update(changes.get("output", {}))
    found = integer.conv(
        x, 0.02, zero_point, weight, scale, weight_zero_point, bias, **geo, **output
    )
    sums = plain.conv_sums(x, zero_point, weight, weight_zero_point, bias, **geo)
    factors = plain.multiplier(0.02, scale, output["scale"])
    expected = plain.rescaled(sums, factors, output["zero_point"], output["qmin"], output["qmax"])
    return found, expected


@BOUNDED
@given(data=st.data())
def test_conv_equals_plain_integers(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = (data.draw(st.integers(1, 2)) for _ in range(2))

    def per_axis(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(spatial)]

    kernel, stride, padding, dilation = (per_axis(1, 3), per_axis(1, 2), per_axis(0, 2),
                                         per_axis(1, 2))  # fmt: skip
    size = [d * (k - 1) + 1 + e for k, d, e in zip(kernel, dilation, per_axis(0, 2), strict=True)]
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    geo = geometry(spatial, stride=stride, padding=padding, dilation=dilation, groups=groups)
    found, expected = run_conv(
        plain.uint8([2, ins * groups, *size]),
        plain.int8([outs * groups, ins, *kernel]),
        geo,
        weight_zero_point=data.draw(
            st.sampled_from([None, torch.randint(-128, 128, (outs * groups,), dtype=torch.int32)])
        ),
        bias=data.draw(st.sampled_from([None, torch.randint(-99, 99, (outs * groups,)).int()])),
    )
    assert found.dtype == torch.uint8
    assert plain.same(found, expected)


@BOUNDED
@given(data=st.data())
def test_conv_transpose_equals_plain_integers(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 3))
    groups, ins, outs = (data.draw(st.integers(1, 2)) for _ in range(3))
    kernel, stride, dilation = (
        [data.draw(st.integers(1, high)) for _ in range(spatial)] for high in (3, 2, 2)
    )
    size = [data.draw(st.integers(2, 3)) for _ in range(spatial)]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [data.draw(st.integers(0, min(1, r))) for r in reach]
    output_padding = [
        data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    ]
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    geo = geometry(spatial, stride=stride, padding=padding, dilation=dilation, groups=groups)
    geo["output_padding"] = output_padding
    x = plain.uint8([2, ins * groups, *size])
    weight = plain.int8([ins * groups, outs, *kernel])
    bias = torch.randint(-99, 99, (outs * groups,), dtype=torch.int32)
    shifts = torch.randint(-9, 9, (data.draw(st.sampled_from([1, outs * groups])),)).int()
    scale = plain.scales(outs * groups)
    found = integer.conv_transpose(
        x, 0.02, 117, weight, scale, shifts, bias, **geo, scale=0.2, zero_point=128, qmin=0,
        qmax=255, dtype=torch.uint8,
    )  # fmt: skip
    sums = plain.conv_transpose_sums(x, 117, weight, shifts, bias, **geo)
    expected = plain.rescaled(sums, plain.multiplier(0.02, scale, 0.2), 128, 0, 255)
    assert plain.same(found, expected)


def test_padding_pads_with_the_zero_point() -> None:
    x = torch.full((1, 1, 2, 2), 117, dtype=torch.uint8)
    found, _ = run_conv(
        x, torch.full((1, 1, 3, 3), 100, dtype=torch.int8), geometry(2, padding=[1, 1]), bias=None
    )
    assert torch.equal(found, torch.full((1, 1, 2, 2), 120, dtype=torch.uint8))


@pytest.mark.parametrize("kernel", [1, 3])
def test_depthwise_with_two_outputs_for_each_input(kernel: int) -> None:
    found, expected = run_conv(
        plain.uint8([2, 3, 6, 5]),
        plain.int8([6, 1, kernel, kernel]),
        geometry(2, stride=[2, 1], padding=[1, 2], dilation=[1, 2], groups=3),
    )
    assert plain.same(found, expected)


def test_pointwise_beyond_float32_stays_exact() -> None:
    # 4,000 products of up to 255 · 128 pass 2^24: this is the float64 carrier.
    x = torch.randint(200, 256, (1, 4000, 2, 1), dtype=torch.uint8)
    weight = torch.randint(100, 128, (2, 4000, 1, 1), dtype=torch.int8)
    output = {"scale": 20000.0, "qmax": 255}
    found, expected = run_conv(x, weight, geometry(2, stride=[2, 1]), output=output)
    assert plain.same(found, expected)


def test_one_scale_for_the_whole_weight() -> None:
    found, expected = run_conv(
        plain.uint8([1, 2, 4, 4]), plain.int8([3, 2, 3, 3]), geometry(2), scales=1
    )
    assert plain.same(found, expected)


def test_four_bit_codes_clamp_at_fifteen() -> None:
    output = {"zero_point": 3, "qmax": 15, "scale": 0.05}
    found, expected = run_conv(
        plain.uint8([1, 2, 6, 6]), plain.int8([3, 2, 3, 3]), geometry(2), output=output
    )
    assert plain.same(found, expected)
    assert {int(found.min()), int(found.max())} == {0, 15}


def test_relu_is_the_lower_clamp() -> None:
    found, expected = run_conv(
        plain.uint8([1, 2, 6, 6]), plain.int8([3, 2, 3, 3]), geometry(2), output={"qmin": 120}
    )
    assert plain.same(found, expected)
    assert int(found.min()) == 120


@pytest.mark.parametrize("groups", [1, 4])
def test_sixteen_bit_activations_need_more_than_int32(groups: int) -> None:
    x = torch.randint(32000, 32768, (2, 4, 300), dtype=torch.int16)
    weight = torch.randint(100, 128, (4, 4 // groups, 700), dtype=torch.int8)
    geo = geometry(1, padding=[400], groups=groups)
    x = x.repeat(1, 1, 3)
    scale = plain.scales(4)
    found = integer.conv(
        x, 1e-5, 0, weight, scale, None, None, **geo, scale=0.01, zero_point=0, qmin=-32767,
        qmax=32767, dtype=torch.int16,
    )  # fmt: skip
    sums = plain.conv_sums(x, 0, weight, None, None, **geo)
    assert abs(sums).max() > 2**31
    expected = plain.rescaled(sums, plain.multiplier(1e-5, scale, 0.01), 0, -32767, 32767)
    assert found.dtype == torch.int16
    assert plain.same(found, expected)


def test_float32_output_is_the_dequantized_accumulator() -> None:
    x, weight, scale = plain.uint8([2, 2, 5]), plain.int8([3, 2, 3]), plain.scales(3)
    geo = geometry(1)
    found = integer.conv(
        x, 0.02, 9, weight, scale, None, None, **geo, scale=1.0, zero_point=5, qmin=0, qmax=0,
        dtype=torch.float32,
    )  # fmt: skip
    sums = plain.conv_sums(x, 9, weight, None, None, **geo).astype(np.float32)
    expected = sums * plain.multiplier(0.02, scale, 1.0).reshape(1, -1, 1)
    assert torch.equal(found, torch.from_numpy(expected))


def test_residual_is_added_before_the_one_rounding() -> None:
    x, weight, scale = plain.uint8([2, 4, 6, 6]), plain.int8([3, 4, 3, 3]), plain.scales(3)
    residual = plain.uint8([2, 3, 4, 4])
    found = integer.conv(
        x, 0.02, 117, weight, scale, None, None, **geometry(2), scale=0.11, zero_point=100, qmin=0,
        qmax=255, dtype=torch.uint8, residual=residual, residual_scale=0.07,
        residual_zero_point=33,
    )  # fmt: skip
    sums = plain.conv_sums(x, 117, weight, None, None, **geometry(2))
    extra = (residual.numpy().astype(np.float32) - np.float32(33)) * np.float32(0.07 / 0.11)
    expected = plain.rescaled(sums, plain.multiplier(0.02, scale, 0.11), 100, 0, 255, extra)
    assert plain.same(found, expected)


def test_a_float32_output_takes_no_residual() -> None:
    with pytest.raises(CompileError, match="no residual"):
        integer.conv(
            plain.uint8([1, 1, 3]), 1.0, 0, plain.int8([1, 1, 1]), torch.ones(1), None, None,
            **geometry(1), scale=1.0, zero_point=0, qmin=0, qmax=255, dtype=torch.float32,
            residual=plain.uint8([1, 1, 3]),
        )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_last_and_slices_give_the_same_codes(groups: int, kernel: int) -> None:
    x, weight = plain.uint8([2, 8, 5, 6]), plain.int8([4, 4 // groups, kernel, kernel])
    geo = geometry(2, padding=[kernel // 2] * 2, groups=groups)
    scale = plain.scales(4)
    rest = {"scale": 0.3, "zero_point": 99, "qmin": 0, "qmax": 255, "dtype": torch.uint8}
    last = x.contiguous(memory_format=torch.channels_last)
    found = [
        integer.conv(layout, 0.02, 8, weight, scale, None, None, **geo, **rest)
        for layout in (x[:, 4:].contiguous(), x[:, 4:], last[:, 4:])
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found[1].is_contiguous()
    assert found[2].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("groups", "kernel"), [(1, 1), (1, 3), (2, 3), (4, 3)])
def test_a_sample_without_batch_dimension_and_an_empty_batch(groups: int, kernel: int) -> None:
    x, scale = plain.uint8([3, 4, 5, 5]), plain.scales(4)
    weight = plain.int8([4, 4 // groups, kernel, kernel])
    geo = geometry(2, groups=groups)
    rest = {"scale": 0.3, "zero_point": 9, "qmin": 0, "qmax": 255, "dtype": torch.uint8}

    def run(codes: torch.Tensor) -> torch.Tensor:
        return integer.conv(codes, 0.02, 8, weight, scale, None, None, **geo, **rest)

    assert torch.equal(run(x[1]), run(x)[1])
    assert run(x[:0]).shape == (0, *run(x).shape[1:])


@pytest.mark.parametrize(("groups", "kernel"), [(1, 1), (1, 3), (4, 3)])
def test_exact_under_autocast(groups: int, kernel: int) -> None:
    x, weight = plain.uint8([2, 4, 5, 5]), plain.int8([4, 4 // groups, kernel, kernel])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = integer.conv(
            x, 1.0, 9, weight, torch.ones(1), None, None, **geometry(2, groups=groups), scale=1.0,
            zero_point=0, qmin=0, qmax=0, dtype=torch.float32,
        )  # fmt: skip
    sums = plain.conv_sums(x, 9, weight, None, None, **geometry(2, groups=groups))
    assert plain.same(found, sums)


def test_float64_carrier_equals_int64_convolution() -> None:
    # Every code at its extreme: the sums are as large as eight bits make them.
    x = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8)
    weight = torch.full((2, 64, 3, 3), -128, dtype=torch.int8)
    weight[1] = 127
    ones = torch.ones(2)
    found = integer.conv(
        x, 1.0, 0, weight, ones, None, None, **geometry(2), scale=1.0, zero_point=0, qmin=0,
        qmax=0, dtype=torch.float32,
    )  # fmt: skip
    unfolded = x.long().unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
    expected = (unfolded @ weight.long().flatten(1).t()).permute(0, 3, 1, 2)
    assert torch.equal(found, expected.to(torch.float32))


def test_real_values_match_the_float_convolution() -> None:
    # An independent sanity check of the meaning: each output is within half a step, plus the
    # float convolution's own rounding (36 products below 40: 36 · 40 · 2^-23 is under 0.001).
    x, weight, scale = plain.uint8([1, 4, 6, 6]), plain.int8([3, 4, 3, 3]), plain.scales(3)
    found = integer.conv(
        x, 0.02, 117, weight, scale, None, None, **geometry(2, padding=[1, 1]), scale=0.5,
        zero_point=128, qmin=0, qmax=255, dtype=torch.uint8,
    )  # fmt: skip
    real = F.conv2d((x.float() - 117) * 0.02, weight.float() * scale.view(-1, 1, 1, 1), padding=1)
    assert ((found.float() - 128) * 0.5 - real).abs().max() <= 0.25 + 0.001
