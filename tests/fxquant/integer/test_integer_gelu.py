from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import integer
from fxquant.errors import CompileError
from tests.fxquant.integer import plain_transformer as plain
from tests.fxquant.integer.rows import BYTE_ROWS, ROWS, row
from tests.fxquant.integer.shift_exp_range import shift_exp_range

BOUNDED = settings(max_examples=60, deadline=None)
SCALES = st.floats(-4.5, 1.0).map(lambda exponent: 10**exponent)
ZERO_POINTS = st.integers(-128, 255)
GOLDEN = torch.tensor([-40, -16, -8, 0, 8, 16, 40], dtype=torch.int8)


def test_golden_shift_gelu() -> None:
    x0, n = integer.shift_gelu_constants(0.0625, 7)
    assert (x0, n) == (-10, 23)
    expected = torch.tensor([-80, -320, -304, 0, 696, 1696, 5000], dtype=torch.int32)
    assert torch.equal(integer.gelu_i_vit(GOLDEN, 0, x0, n, 8), expected)
    moved = (GOLDEN.int() + 100).to(torch.uint8)
    assert torch.equal(integer.gelu_i_vit(moved, 100, x0, n, 8), expected)


@BOUNDED
@given(ROWS, ZERO_POINTS, SCALES, st.sampled_from([4, 8, 16]))
def test_shift_gelu_equals_unbounded_arithmetic(
    x: Tensor, zero_point: int, scale: float, bits: int
) -> None:
    x0, n = integer.shift_gelu_constants(scale)
    found = integer.gelu_i_vit(x, zero_point, x0, n, bits)
    assert found.dtype == (torch.int64 if x.dtype == torch.int16 else torch.int32)
    centered = [q - zero_point for q in x.tolist()]
    assert found.tolist() == plain.gelu_i_vit(centered, x0, n, bits)


@BOUNDED
@given(BYTE_ROWS, ZERO_POINTS, st.floats(1e-3, 0.3), st.sampled_from([8, 16]))
def test_shift_gelu_stays_in_its_bound(x: Tensor, zero_point: int, scale: float, bits: int) -> None:
    x0, n = integer.shift_gelu_constants(scale)
    found = integer.gelu_i_vit(x, zero_point, x0, n, bits)
    values = x.long() - zero_point
    top = values.max().clamp(min=0)
    low, high = shift_exp_range(top - values, x0, n)
    low0, high0 = shift_exp_range(top, x0, n)
    least, most = low / (low + high0), high / (high + low0)
    # ⌊e · F / 2^(32−b)⌋ with F > (2^31 − 1)/T − 1 loses less than a step, e/2^31 and σ/2^31.
    lost = 2.0 ** (1 - bits) + (-x0 << n) * high / 2**31 + 2.0**-31
    sigma = torch.sigmoid(1.702 * scale * values.double())
    bound = torch.maximum(most - sigma, sigma - least + lost).clamp(min=0) + 1e-12
    real = found.double() * scale * 2.0 ** (1 - bits)
    error = (real - values * scale * sigma).abs()
    assert bool((error <= values.abs() * scale * bound).all())
    # The sigmoid form itself is within 0.0204 of GELU.
    gelu = F.gelu(values.double() * scale)
    assert float((values * scale * sigma - gelu).abs().max()) < 0.0204


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_shift_gelu_over_all_codes(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.arange(info.min, info.max + 1).to(dtype)
    for zero_point in (info.min, 3, info.max):
        for scale in (0.004, 0.0625, 1.0):
            constants = integer.shift_gelu_constants(scale)
            found = integer.gelu_i_vit(x, zero_point, *constants, 8)
            centered = [q - zero_point for q in x.tolist()]
            assert found.tolist() == plain.gelu_i_vit(centered, *constants, 8)
            # A row of its own for every code: all negative or not.
            alone = integer.gelu_i_vit(x.unsqueeze(1), zero_point, *constants, 8).squeeze(1)
            expected = [plain.gelu_i_vit([q], *constants, 8)[0] for q in centered]
            assert alone.tolist() == expected


def test_sixteen_bits_of_sixteen_bit_codes_need_int64() -> None:
    x = torch.tensor([32767, 32767], dtype=torch.int16)
    found = integer.gelu_i_vit(x, -32768, -1, 20, 16)
    assert found.dtype == torch.int64
    assert found.tolist() == plain.gelu_i_vit([65535, 65535], -1, 20, 16)
    assert int(found[0]) > 2**30


def test_shift_gelu_saturates_a_sum_beyond_31_bits() -> None:
    x = row("narrow", torch.int8, 9, 3)
    # E(0) = 2^30 · 1.5: two of them exceed 2^31 − 1.
    found = integer.gelu_i_vit(x, 0, -(3 * 2**14), 15, 8)
    assert found.tolist() == plain.gelu_i_vit(x.tolist(), -(3 * 2**14), 15, 8)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.0625, 100.0])
def test_shift_gelu_constants_keep_the_sum_in_31_bits(scale: float) -> None:
    x0, n = integer.shift_gelu_constants(scale)
    assert x0 == math.floor(-1 / (1.702 * scale))
    assert (-x0 << n) * 2 < 2**31
    assert n == 23 or (-x0 << n + 1) * 2 >= 2**31


def test_shift_gelu_of_any_shape_is_that_of_its_rows() -> None:
    x = torch.randint(0, 256, (3, 2, 700, 90), dtype=torch.uint8).transpose(1, 2)
    found = integer.gelu_i_vit(x, 99, -10, 23, 8)
    assert found.shape == x.shape
    assert torch.equal(found[2, 650:, 1], integer.gelu_i_vit(x[2, 650:, 1], 99, -10, 23, 8))
    assert integer.gelu_i_vit(x[:0], 99, -10, 23, 8).shape == (0, 700, 2, 90)


def test_shift_gelu_refuses_what_has_no_meaning() -> None:
    with pytest.raises(CompileError, match="2 to 16 bits"):
        integer.gelu_i_vit(GOLDEN, 0, -10, 23, 17)
    with pytest.raises(CompileError, match="shift_gelu_constants"):
        integer.gelu_i_vit(GOLDEN, 0, -1000, 23, 8)
    with pytest.raises(CompileError, match="input is"):
        integer.gelu_i_vit(GOLDEN.float(), 0, -10, 23, 8)
