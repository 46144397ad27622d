from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import integer
from fxquant.errors import CompileError
from fxquant.integer.linear import exact_sum_dtype
from tests.fxquant.integer import plain

BOUNDED = settings(max_examples=30, deadline=None)
DTYPES = [torch.uint8, torch.int8, torch.int16]
OUT: tuple[Any, ...] = (0.7, 100, 0, 255, torch.uint8)
FLOAT: tuple[Any, ...] = (1.0, 0, 0, 0, torch.float32)


def codes(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape).to(dtype)


def sums_of(a: Tensor, a_zero: int, b: Tensor, b_zero: int) -> Any:
    return np.matmul(a.numpy().astype(np.int64) - a_zero, b.numpy().astype(np.int64) - b_zero)


@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("b_dtype", DTYPES)
def test_matmul_equals_plain_arithmetic(a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    a, b = codes(a_dtype, (2, 3, 7, 50)), codes(b_dtype, (2, 3, 50, 5))
    sums = sums_of(a, 11, b, -7)
    wide = torch.int64 if torch.int16 in (a_dtype, b_dtype) else torch.int32
    found = integer.matmul_accumulate(a, 11, b, -7)
    assert found.dtype == wide
    assert plain.same(found, sums)

    scale = float(np.abs(sums).max()) * 0.03 * 0.02 * 0.125 / 100
    m = np.float32(0.03 * 0.02 * 0.125 / scale)
    rescaled = integer.matmul(a, 0.03, 11, b, 0.02, -7, 0.125, scale, 100, 0, 255, torch.uint8)
    assert plain.same(rescaled, plain.codes(sums.astype(np.float32) * m, 100, 0, 255))

    real = integer.matmul(a, 0.03, 11, b, 0.02, -7, 0.125, *FLOAT)
    expected = sums.astype(np.float32) * np.float32(0.03 * 0.02 * 0.125)
    assert torch.equal(real, torch.from_numpy(expected))


@BOUNDED
@given(
    depth=st.integers(1, 400),
    zeros=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    ends=st.tuples(st.booleans(), st.booleans()),
)
def test_carried_sums_equal_integer_arithmetic(
    depth: int, zeros: tuple[int, int], ends: tuple[bool, bool]
) -> None:
    # The largest sums of every depth, on both sides of 2^24, where the carrier changes.
    a = torch.full((2, depth), 255 * ends[0], dtype=torch.uint8)
    b = torch.full((depth, 3), 255 * ends[1], dtype=torch.uint8)
    a[1], b[:, 1] = codes(torch.uint8, (depth,)), codes(torch.uint8, (depth,))
    found = integer.matmul_accumulate(a, zeros[0], b, zeros[1])
    assert plain.same(found, sums_of(a, zeros[0], b, zeros[1]))


def test_carrier_is_float32_up_to_2_to_the_24() -> None:
    assert exact_sum_dtype(258 * 255 * 255, 255, 255) == torch.float32
    assert exact_sum_dtype(259 * 255 * 255, 255, 255) == torch.float64
    assert exact_sum_dtype(100, 257) == torch.float64
    for depth in (258, 259):
        a = torch.full((1, depth), 255, dtype=torch.uint8)
        assert int(integer.matmul_accumulate(a, 0, a.t(), 0)) == depth * 255**2


@pytest.mark.parametrize(
    ("dtype", "depth", "fits"),
    [
        (torch.uint8, 33025, True),
        (torch.uint8, 33026, False),
        # 32768² · K reaches 2^53.
        (torch.int16, 2**23, True),
        (torch.int16, 2**23 + 1, False),
    ],
)
def test_the_longest_sum_is_accepted_and_the_next_is_refused(
    dtype: torch.dtype, depth: int, fits: bool
) -> None:
    end = 255 if dtype == torch.uint8 else -32768
    a = torch.full((1, 1), end, dtype=dtype).expand(1, depth)
    if fits:
        assert int(integer.matmul_accumulate(a, 0, a.t(), 0)) == depth * end**2
    else:
        for call in (integer.matmul_accumulate, integer.matmul):
            args = (a, 0, a.t(), 0) if call is integer.matmul_accumulate else (
                a, 1.0, 0, a.t(), 1.0, 0, 1.0, *OUT)  # fmt: skip
            with pytest.raises(CompileError, match="split the shared dimension"):
                call(*args)


def test_large_sums_round_once_to_float32() -> None:
    a = torch.full((1, 1001), 255, dtype=torch.uint8)
    b = torch.full((1001, 1), 253, dtype=torch.uint8)
    found = integer.matmul(a, 1.0, 0, b, 1.0, 0, 1.0, *FLOAT)
    assert float(found) == float(np.float32(255 * 253 * 1001)) != 255 * 253 * 1001


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((4, 5), (5, 3)), ((2, 1, 4, 5), (3, 5, 3)), ((4, 5), (2, 5, 3)), ((0, 4, 5), (0, 5, 3))],
)
def test_matmul_broadcasts_as_torch_does(a_shape: Any, b_shape: Any) -> None:
    a, b = codes(torch.uint8, a_shape), codes(torch.uint8, b_shape)
    found = integer.matmul_accumulate(a, 3, b, 5)
    expected = torch.matmul(a.long() - 3, b.long() - 5)
    assert torch.equal(found.long(), expected)


def test_matmul_of_many_rows_and_of_transposed_views() -> None:
    a, b = codes(torch.uint8, (3, 2, 600, 700)), codes(torch.uint8, (3, 2, 4, 700))
    found = integer.matmul_accumulate(a, 3, b.transpose(-1, -2), 5)
    assert plain.same(found, sums_of(a, 3, b.transpose(-1, -2), 5))


@pytest.mark.parametrize("depth", [100, 3000])
def test_exact_under_reduced_matmul_precision_and_autocast(depth: int) -> None:
    a, b = codes(torch.uint8, (8, depth)), codes(torch.uint8, (depth, 8))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = integer.matmul_accumulate(a, 128, b, 100)
    finally:
        torch.set_float32_matmul_precision(before)
    assert plain.same(found, sums_of(a, 128, b, 100))


def test_matmul_refuses_what_has_no_product() -> None:
    a = codes(torch.uint8, (2, 3))
    with pytest.raises(CompileError, match="takes"):
        integer.matmul_accumulate(a, 0, a, 0)
    with pytest.raises(CompileError, match="takes"):
        integer.matmul_accumulate(a[0], 0, a.t(), 0)
    with pytest.raises(CompileError, match="input is"):
        integer.matmul_accumulate(a, 0, a.t().float(), 0)


@pytest.mark.parametrize("a_dtype", [torch.uint8, torch.int8])
def test_mul_accumulate_over_all_codes(a_dtype: torch.dtype) -> None:
    a = torch.arange(256).to(a_dtype).view(-1, 1)
    b = torch.arange(256, dtype=torch.uint8)
    found = integer.mul_accumulate(a, 128, b, 255)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), (a.long() - 128) * (b.long() - 255))


def test_mul_accumulate_of_sixteen_bits_does_not_wrap() -> None:
    ends = torch.tensor([-32768, 32767], dtype=torch.int16)
    found = integer.mul_accumulate(ends, 32767, ends, 32767)
    assert found.tolist() == [65535**2, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_accumulate_equals_plain_arithmetic(dtype: torch.dtype) -> None:
    x, weight = codes(dtype, (2, 3, 40)), plain.int8([6, 40])
    bias = torch.randint(-(2**20), 2**20, (6,), dtype=torch.int32)
    shifts = torch.arange(6, dtype=torch.int32)
    found = integer.linear_accumulate(x, 9, weight, shifts, bias)
    expected = sums_of(x, 9, weight.t(), 0) - sums_of(x, 9, torch.ones(40, 1), 0) * shifts.numpy()
    assert found.dtype == (torch.int64 if dtype == torch.int16 else torch.int32)
    assert plain.same(found, expected + bias.numpy())


def test_linear_accumulate_keeps_every_bit_of_a_large_sum() -> None:
    # Beyond 2^24 float32 would round the sum, and adding the bias to a float32 sum would too.
    x = torch.full((1, 250), 255, dtype=torch.uint8)
    weight = torch.full((1, 250), 127, dtype=torch.int8)
    bias = torch.tensor([2**30 + 1])
    for rows in (x, x[:, :10]):
        found = integer.linear_accumulate(rows, 0, weight[:, : rows.shape[1]], None, bias)
        assert int(found) == 255 * 127 * rows.shape[1] + 2**30 + 1


@pytest.mark.parametrize(("length", "fits"), [(65793, True), (65794, False)])
def test_linear_accumulate_refuses_what_an_int32_cannot_hold(length: int, fits: bool) -> None:
    x = torch.full((1, length), 255, dtype=torch.uint8)
    weight = torch.full((1, length), -128, dtype=torch.int8)
    if fits:
        assert int(integer.linear_accumulate(x, 0, weight, None, None)) == -255 * 128 * length
    else:
        with pytest.raises(CompileError, match="can reach the accumulator"):
            integer.linear_accumulate(x, 0, weight, None, None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_conv_accumulate_equals_plain_arithmetic(
    dtype: torch.dtype, dimensions: int, groups: int
) -> None:
    x = codes(dtype, (2, 4, *(7, 6, 5)[:dimensions]))
    weight = plain.int8([8, 4 // groups, *(3, 2, 3)[:dimensions]])
    bias = torch.randint(-(2**20), 2**20, (8,), dtype=torch.int32)
    geometry = [[2, 1, 1][:dimensions], [1, 0, 2][:dimensions], [1, 2, 1][:dimensions], groups]
    for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        found = integer.conv_accumulate(layout, 9, weight, None, bias, *geometry)  # type: ignore[arg-type]
        assert found.dtype == (torch.int64 if dtype == torch.int16 else torch.int32)
        assert plain.same(found, plain.conv_sums(x, 9, weight, None, bias, *geometry))  # type: ignore[arg-type]


def test_conv_accumulate_adds_a_large_bias_in_integers() -> None:
    x, weight = plain.uint8([1, 2, 4, 4]), plain.int8([3, 2, 3, 3])
    bias = torch.tensor([2**30 + 1, -(2**30) - 1, 3])
    found = integer.conv_accumulate(x, 0, weight, None, bias, [1, 1], [1, 1], [1, 1], 1)
    zero = integer.conv_accumulate(x, 0, weight, None, None, [1, 1], [1, 1], [1, 1], 1)
    assert torch.equal(found - zero, bias.view(1, 3, 1, 1).expand(zero.shape).int())
    assert torch.equal(zero.double(), F.conv2d(x.double(), weight.double(), padding=1))


@pytest.mark.parametrize("dim", [[-1], [0, 2], [1], []])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sum_accumulate_sums_the_centered_codes(dim: list[int], keepdim: bool) -> None:
    for dtype in DTYPES:
        x = codes(dtype, (2, 3, 4))
        found = integer.sum_accumulate(x, 100, dim, keepdim)
        assert found.dtype == torch.int64
        assert torch.equal(found, (x.long() - 100).sum(dim, keepdim=keepdim))


# -- weighted mean --------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([0, 7, 128]))
def test_weighted_mean_is_within_half_a_step_of_the_real_quotient(
    seed: int, length: int, zero_point: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 256, (2, 4, length), generator=generator, dtype=torch.uint8)
    b = torch.randint(0, 256, (2, length, 3), generator=generator, dtype=torch.uint8)
    a[0, 0] = 0
    scale, b_scale = 0.05, 0.04
    found = torch.ops.fxquant.weighted_mean(
        a, 0, b, b_scale, zero_point, scale, 128, 0, 255, torch.uint8
    )
    total = a.double().sum(-1, keepdim=True)
    real = (a.double() @ (b.double() - zero_point)) / total.clamp(min=1) * b_scale / scale
    # The quotient and the product are each rounded to float32, of values below 2^13 steps.
    wanted = (real + 128).clamp(0, 255)
    assert float((found.double() - wanted).abs().max()) <= 0.5 + 2**-9


def test_weighted_mean_of_a_row_of_zeros_is_zero() -> None:
    a, b = torch.zeros(1, 3, dtype=torch.uint8), torch.full((3, 2), 200, dtype=torch.uint8)
    found = torch.ops.fxquant.weighted_mean(a, 0, b, 1.0, 0, 1.0, 5, 0, 255, torch.uint8)
    assert torch.equal(found, torch.full((1, 2), 5, dtype=torch.uint8))
