from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import integer
from fxquant.errors import CompileError
from tests.fxquant.integer import plain

BOUNDED = settings(max_examples=30, deadline=None)
SCALES = st.floats(1e-3, 10.0)
CODES = st.integers(0, 255)
ALL_CODES = torch.arange(256, dtype=torch.uint8)


@BOUNDED
@given(a_scale=SCALES, b_scale=SCALES, scale=SCALES, zeros=st.tuples(CODES, CODES, CODES))
def test_add_equals_plain_arithmetic(
    a_scale: float, b_scale: float, scale: float, zeros: tuple[int, int, int]
) -> None:
    a, b = ALL_CODES.view(1, 256), ALL_CODES[::5].reshape(-1, 1)
    found = integer.add(
        a, a_scale, zeros[0], b, b_scale, zeros[1], scale, zeros[2], 0, 255, torch.uint8
    )
    left = (a.numpy().astype(np.float32) - np.float32(zeros[0])) * np.float32(a_scale / scale)
    right = (b.numpy().astype(np.float32) - np.float32(zeros[1])) * np.float32(b_scale / scale)
    assert plain.same(found, plain.codes(left + right, zeros[2], 0, 255))


@BOUNDED
@given(a_scale=SCALES, b_scale=SCALES, scale=SCALES, zeros=st.tuples(CODES, CODES, CODES))
def test_mul_equals_plain_arithmetic(
    a_scale: float, b_scale: float, scale: float, zeros: tuple[int, int, int]
) -> None:
    a, b = ALL_CODES.view(1, 256), ALL_CODES[::5].reshape(-1, 1)
    found = integer.mul(
        a, a_scale, zeros[0], b, b_scale, zeros[1], scale, zeros[2], 0, 255, torch.uint8
    )
    product = (a.numpy().astype(np.int64) - zeros[0]) * (b.numpy().astype(np.int64) - zeros[1])
    real = product.astype(np.float32) * np.float32(a_scale * b_scale / scale)
    assert plain.same(found, plain.codes(real, zeros[2], 0, 255))


def test_mul_of_sixteen_bit_codes_does_not_wrap() -> None:
    extreme = torch.tensor([-32768, 32767], dtype=torch.int16)
    found = integer.mul(extreme, 1.0, 32767, extreme, 1.0, 32767, 2.0**18, 0, -32767, 32767,
                        torch.int16)  # fmt: skip
    # 65535² / 2^18 = 16383.50 in float32, a tie; a product that wrapped would be near 0.
    assert found.tolist() == [16384, 0]


def test_add_in_sixteen_bits() -> None:
    a = torch.tensor([-32767, 1, 32767], dtype=torch.int16)
    found = integer.add(a, 1.0, 0, a, 1.0, 0, 1.0, 0, -32767, 32767, torch.int16)
    assert found.tolist() == [-32767, 2, 32767]


def test_add_does_not_fuse_its_multiply_adds() -> None:
    # float32(0.1) is a little above 0.1: (10n + 5) · 0.1 rounds to n + 0.5, and after −n the tie
    # goes to 0. A fused multiply-add would keep the excess and round to 1.
    n = torch.arange(500, 3000, dtype=torch.int16)
    found = integer.add(10 * n + 5, 0.1, 0, -n, 1.0, 0, 1.0, 0, -32767, 32767, torch.int16)
    assert not found.any()
    fused = (10 * n + 5).double() * float(np.float32(0.1)) - n
    assert bool((fused.float().round() == 1).all()), "the case must tell the two apart"


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_channel_affine_equals_plain_arithmetic(shape: tuple[int, ...]) -> None:
    x, weight, bias = plain.uint8(shape), torch.randn(3), torch.randn(3)
    found = integer.channel_affine(x, 0.05, 99, weight, bias, 0.07, 111, 0, 255, torch.uint8)
    column = (1, 3, *[1] * (len(shape) - 2))
    m = (weight.numpy().astype(np.float64) * 0.05 / 0.07).astype(np.float32).reshape(column)
    b = (bias.numpy().astype(np.float64) / 0.07).astype(np.float32).reshape(column)
    real = (x.numpy().astype(np.float32) - np.float32(99)) * m + b
    assert plain.same(found, plain.codes(real, 111, 0, 255))


def test_lookup_over_all_codes_and_layouts() -> None:
    table = plain.uint8([256])
    assert torch.equal(integer.lookup(ALL_CODES, table), table)
    x = plain.uint8([2, 3, 4, 5])
    expected = torch.tensor([int(table[q]) for q in x.flatten().tolist()]).view(x.shape).byte()
    last = x.contiguous(memory_format=torch.channels_last)
    for layout in (x, last, x.transpose(1, 3).contiguous().transpose(1, 3), x[0, 0, 0, 0]):
        found = integer.lookup(layout, table)
        assert torch.equal(found, expected if layout.dim() else expected[0, 0, 0, 0])
    assert integer.lookup(last, table).is_contiguous(memory_format=torch.channels_last)


def test_lookup_takes_eight_bit_codes_only() -> None:
    with pytest.raises(CompileError, match="requantize to 8 bits"):
        integer.lookup(torch.zeros(3, dtype=torch.int16), plain.uint8([256]))


@pytest.mark.parametrize("function", [F.silu, torch.sigmoid, F.gelu, torch.tanh, F.hardswish])
def test_a_table_is_the_rounded_function(function: object) -> None:
    table = integer.build_table(function, 0.05, 117, 0.03, 20, 0, 255)  # type: ignore[arg-type]
    assert table.dtype == torch.uint8
    assert table.shape == (256,)
    for q in range(256):
        real = function(torch.tensor((q - 117) * 0.05, dtype=torch.float64))  # type: ignore[operator]
        assert int(table[q]) == min(max(round(float(real) / 0.03) + 20, 0), 255)


def test_a_table_of_the_identity_is_the_identity() -> None:
    assert torch.equal(integer.build_table(lambda x: x, 0.1, 7, 0.1, 7, 0, 255), ALL_CODES)


def test_a_table_saturates_at_infinity() -> None:
    table = integer.build_table(torch.reciprocal, 1.0, 3, 0.1, 0, 0, 15)
    assert int(table[3]) == 15


def test_a_table_takes_nan_for_zero() -> None:
    table = integer.build_table(torch.sqrt, 1.0, 3, 0.1, 7, 0, 255)
    assert table[:5].tolist() == [7, 7, 7, 7, 17]


def test_a_table_refuses_what_is_not_elementwise() -> None:
    with pytest.raises(CompileError, match="elementwise"):
        integer.build_table(torch.sum, 1.0, 3, 0.1, 0, 0, 15)
    with pytest.raises(CompileError, match="uint8"):
        integer.build_table(torch.tanh, 1.0, 3, 0.1, 0, -32767, 32767)


def test_quantize_multiplies_by_the_float32_inverse_of_the_float32_scale() -> None:
    scale = 5 / 997
    inverse = np.float32(1) / np.float32(scale)
    assert inverse != np.float32(1 / scale), "the case must tell the two apart"
    x = torch.randn(100_000) * 30_000 * scale
    found = integer.quantize(x, scale, 0, -32767, 32767, torch.int16)
    assert plain.same(found, plain.codes(x.numpy() * inverse, 0, -32767, 32767))
    # As every tie is decided by the last bit, halves of codes catch the other inverse.
    ties = (torch.arange(-30_000, 30_000) + 0.5) * float(np.float32(scale))
    found = integer.quantize(ties, scale, 0, -32767, 32767, torch.int16)
    assert plain.same(found, plain.codes(ties.numpy() * inverse, 0, -32767, 32767))
    divided = plain.codes(ties.numpy() / np.float32(scale), 0, -32767, 32767)
    assert not plain.same(found, divided), "the case must tell the two apart"


def test_quantize_rounds_ties_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, float("inf")])
    found = integer.quantize(x, 1.0, 10, 0, 255, torch.uint8)
    assert found.tolist() == [10, 12, 12, 10, 8, 255, 0, 255]
    assert integer.quantize(x, 1.0, 10, 0, 15, torch.uint8).max() == 15


def test_quantize_takes_nan_for_zero() -> None:
    x = torch.tensor([float("nan"), 1.0, float("-inf")])
    assert integer.quantize(x, 1.0, 10, 0, 255, torch.uint8).tolist() == [10, 11, 0]


def test_quantize_to_int16() -> None:
    x = torch.tensor([-1e9, -3.0, 0.25, 1e9])
    found = integer.quantize(x, 0.5, 0, -32767, 32767, torch.int16)
    assert found.dtype == torch.int16
    assert found.tolist() == [-32767, -6, 0, 32767]


def test_dequantize_is_one_float32_product() -> None:
    found = integer.dequantize(ALL_CODES, 0.1, 128)
    expected = (np.arange(256, dtype=np.float32) - np.float32(128)) * np.float32(0.1)
    assert torch.equal(found, torch.from_numpy(expected))


def test_quantize_after_dequantize_is_the_identity() -> None:
    for scale in (0.1, 0.003, 1 / 3):
        real = integer.dequantize(ALL_CODES, scale, 77)
        assert torch.equal(integer.quantize(real, scale, 77, 0, 255, torch.uint8), ALL_CODES)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_dequantize_weight_along_an_axis(axis: int) -> None:
    weight = plain.int8([2, 3, 4])
    scale = plain.scales(weight.shape[axis])
    shifts = torch.arange(weight.shape[axis], dtype=torch.int32)
    found = integer.dequantize_weight(weight, scale, shifts, axis)
    for index in range(weight.shape[axis]):
        part = (weight.select(axis, index).float() - index) * scale[index]
        assert torch.equal(found.select(axis, index), part)


def test_dequantize_weight_with_one_scale() -> None:
    weight = plain.int8([2, 3])
    found = integer.dequantize_weight(weight, torch.tensor([0.5]), None, 0)
    assert torch.equal(found, weight.float() * 0.5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_an_output_type_that_is_no_code_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(CompileError, match="the output is"):
        integer.mul(ALL_CODES, 1.0, 0, ALL_CODES, 1.0, 0, 1.0, 0, 0, 255, dtype)


def test_elementwise_operators_keep_channels_last() -> None:
    x = plain.uint8([2, 3, 4, 5]).contiguous(memory_format=torch.channels_last)
    rest = (0.1, 3, 0, 255, torch.uint8)
    for found in (
        integer.add(x, 0.1, 1, x, 0.2, 2, *rest),
        integer.channel_affine(x, 0.1, 1, torch.ones(3), torch.ones(3), *rest),
        integer.quantize(integer.dequantize(x, 0.1, 1), *rest),
    ):
        assert found.is_contiguous(memory_format=torch.channels_last)
