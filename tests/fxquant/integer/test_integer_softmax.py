from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import integer
from fxquant.errors import CompileError
from fxquant.integer.softmax import shift_exp, shift_exp_constants
from tests.fxquant.integer import plain_transformer as plain
from tests.fxquant.integer.rows import BYTE_ROWS, ROWS, row
from tests.fxquant.integer.shift_exp_range import BEND, shift_exp_range

BOUNDED = settings(max_examples=60, deadline=None)
GOLDEN = torch.tensor([10, 0, -5, -20, -64], dtype=torch.int8)
SCALES = st.floats(-4.5, 1.0).map(lambda exponent: 10**exponent)
ALL = torch.arange(256)


def exact_softmax(x: Tensor, scale: float) -> Tensor:
    return torch.softmax(x.double() * scale, -1)


def test_golden_shift_exp() -> None:
    found = shift_exp(10 - GOLDEN.long(), -16, 15)
    assert found.tolist() == [524288, 294912, 212992, 86016, 5632]


@BOUNDED
@given(SCALES, st.integers(1, 4096), st.integers(0, 20))
def test_shift_exp_equals_unbounded_arithmetic_and_stays_in_its_bound(
    scale: float, summands: int, most: int
) -> None:
    try:
        x0, n = shift_exp_constants(scale, summands, most)
    except CompileError:
        assert math.ceil(1 / scale) * summands >= 2**31
        return
    found = shift_exp(ALL, x0, n)
    assert found.tolist() == [plain.shift_exp(-d, x0, n) for d in range(256)]
    assert int(found.min()) >= 1
    assert int(found[0]) == -x0 << n
    low, high = shift_exp_range(ALL, x0, n)
    ratio = found / found[0]
    assert bool((ratio >= low * (1 - 1e-12)).all())
    assert bool((ratio <= high * (1 + 1e-12)).all())
    if scale <= 1 / 16 and n == 15:
        # What the bound means: BEND − 1 from the line, 0.002 from 1.4375, less than S from the
        # roundings, which are in units of the input; 2^-n from the lowest value.
        error = (ratio - (-scale * ALL.double()).exp()).abs()
        assert float(error.max()) < BEND - 1 + 0.002 + scale + 2.0**-n


@pytest.mark.parametrize(("scale", "length"), [(0.0625, 5), (0.0625, 4096), (1e-4, 197), (9.0, 9)])
def test_shiftmax_constants_keep_the_sum_in_31_bits(scale: float, length: int) -> None:
    x0, n = integer.shiftmax_constants(scale, length)
    assert x0 == math.floor(-1 / scale)
    assert (-x0 << n) * length < 2**31
    assert n == 15 or (-x0 << n + 1) * length >= 2**31


@pytest.mark.parametrize("bits", [8, 16])
def test_golden_shiftmax(bits: int) -> None:
    found = integer.softmax_i_vit(GOLDEN, 0, *integer.shiftmax_constants(0.0625, 5), bits, None)
    expected = [59, 33, 24, 9, 0] if bits == 8 else [15280, 8595, 6207, 2506, 164]
    dtype = torch.uint8 if bits == 8 else torch.int16
    assert torch.equal(found, torch.tensor(expected, dtype=dtype))


@BOUNDED
@given(ROWS, SCALES, st.sampled_from([4, 8, 16]))
def test_shiftmax_equals_unbounded_arithmetic(x: Tensor, scale: float, bits: int) -> None:
    try:
        x0, n = integer.shiftmax_constants(scale, len(x))
    except CompileError:
        return
    found = integer.softmax_i_vit(x, 99, x0, n, bits, None)
    assert found.tolist() == plain.softmax_i_vit(x.tolist(), x0, n, bits)


@BOUNDED
@given(BYTE_ROWS, st.floats(1e-3, 0.5), st.sampled_from([8, 16]))
def test_shiftmax_stays_in_its_bound(x: Tensor, scale: float, bits: int) -> None:
    x0, n = integer.shiftmax_constants(scale, len(x))
    found = integer.softmax_i_vit(x, 0, x0, n, bits, None) * 2.0 ** (1 - bits)
    low, high = shift_exp_range(x.long().max() - x.long(), x0, n)
    # Every share grows with its own exponential and falls with the others.
    least = low / (low + high.sum() - high).clamp(min=1e-300)
    most = high / (high + (low.sum() - low).clamp(min=0))
    # ⌊e · F / 2^(32−b)⌋ with F > (2^31 − 1)/T − 1 loses less than a step, e/2^31 and p/2^31.
    lost = 2.0 ** (1 - bits) + (-x0 << n) * high / 2**31 + 2.0**-31
    assert bool((found <= most + 1e-12).all())
    assert bool((found >= least - lost).all())
    error = (found - exact_softmax(x, scale)).abs()
    exact = exact_softmax(x, scale)
    assert bool((error <= torch.maximum(most - exact, exact - least + lost) + 1e-12).all())


def test_shiftmax_of_constants_that_overflow_is_refused() -> None:
    for x0, n in ((-(2**16), 15), (0, 15), (-16, 31), (-16, -1)):
        with pytest.raises(CompileError, match="shiftmax_constants"):
            integer.softmax_i_vit(GOLDEN, 0, x0, n, 8, None)


def test_shiftmax_saturates_a_sum_beyond_31_bits() -> None:
    x = row("equal", torch.uint8, 4096, 0)
    # Each exponential is 2^30: T is cut to 2^31 − 1, F to 1.
    found = integer.softmax_i_vit(x, 0, -(2**15), 15, 16, None)
    assert found.tolist() == plain.softmax_i_vit(x.tolist(), -(2**15), 15, 16)


def test_exp_table_is_rounded_exp() -> None:
    for scale in (1e-5, 0.0625, 3.0):
        table = integer.exp_table(scale)
        assert table.dtype == torch.int32
        assert table.tolist() == [round(2**16 * math.exp(-d * scale)) for d in range(256)]


@BOUNDED
@given(BYTE_ROWS, SCALES, st.sampled_from([(1 / 255, 255), (2.0**-7, 128), (2.0**-15, 32767)]))
def test_table_softmax_equals_unbounded_arithmetic_and_stays_in_its_bound(
    x: Tensor, scale: float, grid: tuple[float, int]
) -> None:
    step, qmax = grid
    numerator = round(256 / step)
    dtype = torch.uint8 if qmax <= 255 else torch.int16
    table = integer.exp_table(scale)
    found = integer.softmax_table(x, table, numerator, 0, qmax, dtype, None)
    assert found.dtype == dtype
    assert found.tolist() == plain.softmax_table(x.tolist(), table.tolist(), numerator, 0, qmax)
    # Each entry is off by ≤ ½ (the maximum's by nothing), so that a share p = e/T is off by
    # ≤ (½ + p(N − 1)/2)/T; rounding adds ½ of a step, the numerator's p/(2 · numerator), and
    # clamping what p exceeds qmax by.
    exact = exact_softmax(x, scale)
    total = float(table[(x.long().max() - x.long())].sum())
    bound = step / 2 + (0.5 + exact * (len(x) - 1) / 2) / total + exact / (2 * numerator)
    bound = bound + (exact - qmax * step).clamp(min=0)
    assert bool(((found * step - exact).abs() <= bound + 1e-12).all())


def test_table_softmax_refuses_sums_that_float64_cannot_hold() -> None:
    x, table = torch.zeros(2, 8, dtype=torch.uint8), integer.exp_table(0.1)
    rest = (0, 255, torch.uint8, None)
    for bad in (table - 1, torch.full_like(table, 2**31 - 1)):
        with pytest.raises(CompileError, match="needs entries"):
            integer.softmax_table(x, bad, 2**22, *rest)
    with pytest.raises(CompileError, match="needs entries"):
        integer.softmax_table(x, table, 0, *rest)
    with pytest.raises(CompileError, match="requantize to 8 bits"):
        integer.softmax_table(x.short(), table, 65280, *rest)


def test_golden_log_int_softmax() -> None:
    constants = integer.log_softmax_constants(0.0625, 5)
    assert constants == (-12, 43, 714, 30)
    found = integer.log_int_softmax(GOLDEN, 0, *constants, 4)
    assert torch.equal(found, torch.tensor([1, 2, 2, 4, 7]))
    powers = integer.softmax_log2(GOLDEN, 0, *constants, 4, None)
    assert torch.equal(powers, torch.tensor([2**14, 2**13, 2**13, 2**11, 2**8]).short())


@BOUNDED
@given(ROWS, SCALES, st.integers(2, 4))
def test_log_int_softmax_equals_unbounded_arithmetic(x: Tensor, scale: float, bits: int) -> None:
    constants = integer.log_softmax_constants(scale, len(x))
    found = integer.log_int_softmax(x, 5, *constants, bits)
    expected = plain.log_int_softmax(x.tolist(), *constants, bits)
    assert found.tolist() == expected
    powers = integer.softmax_log2(x, 5, *constants, bits, None)
    assert powers.dtype == torch.int16
    assert powers.tolist() == [0 if q == 2**bits else min(2 ** (15 - q), 32767) for q in expected]


@BOUNDED
@given(BYTE_ROWS, st.floats(2e-3, 0.25))
def test_log_int_softmax_stays_in_its_bound(x: Tensor, scale: float) -> None:
    constants = integer.log_softmax_constants(scale, len(x))
    x0, n = constants[0], constants[3]
    found = integer.log_int_softmax(x, 0, *constants, 4)
    # ln e(d)/e(0) = −d·S within: q roundings of x0, each at most S + 5e-5 (0.6931 for ln 2); the
    # polynomial's 0.004; the floors of b and c, at most X · 1 and 1 of values above 0.49 · c, that
    # is (0.6931/S + 1) · S² · a/0.49 < 0.51 · S + 0.74 · S². Beyond n halvings nothing falls.
    distances = x.long().max() - x.long()
    q = torch.div(distances, -x0, rounding_mode="floor").clamp(max=n)
    slack = q * (scale + 5e-5) + 0.004 + 0.51 * scale + 0.74 * scale**2
    clamped = torch.where(distances > n * -x0, n * math.log(2), distances * scale)
    low, high = (-clamped - slack).exp(), (-clamped + slack).exp()
    least = low / (low + high.sum() - high)
    most = high / (high + (low.sum() - low).clamp(min=0))
    # L rounds log₂ρ up from 1.5 · 2^k on, and ρ is within ½ of 1/p.
    ratio_most, ratio_least = 1 / least + 0.5, 1 / most - 0.5
    inside = found < 16
    assert bool((2.0**found >= ratio_least / 1.5 * (1 - 1e-9))[inside].all())
    assert bool((2.0**found <= ratio_most / 0.75 * (1 + 1e-9)).all())


def test_log_int_softmax_of_a_vanished_exponential_is_zero() -> None:
    # r(r + 7) + c is below 0 for some r with c = 9, and never above it with c = 0.
    found = integer.log_int_softmax(ALL.byte(), 0, -7, 7, 9, 3, 4)
    assert found.tolist() == plain.log_int_softmax(list(range(256)), -7, 7, 9, 3, 4)
    assert not integer.softmax_log2(ALL.byte(), 0, -7, 7, 0, 3, 4, None).any()


def test_log_softmax_refuses_bad_constants() -> None:
    for x0, b, c, n, bits in ((0, 1, 1, 1, 4), (-1, 1, 1, 31, 4), (-1, 1, 1, 1, 5),
                              (-1, 1, 2**30, 30, 4)):  # fmt: skip
        with pytest.raises(CompileError, match=r"softmax_log2"):
            integer.log_int_softmax(GOLDEN, 0, x0, b, c, n, bits)
    with pytest.raises(CompileError, match="too fine"):
        integer.log_softmax_constants(1e-9, 100)
    with pytest.raises(CompileError, match="too fine"):
        integer.shiftmax_constants(1e-9, 100)


SOFTMAXES: dict[str, Any] = {
    "i-vit": lambda x, mask: integer.softmax_i_vit(x, 3, -16, 15, 8, mask),
    "table": lambda x, mask: integer.softmax_table(
        x, integer.exp_table(0.0625), 65280, 0, 255, torch.uint8, mask
    ),
    "log2": lambda x, mask: integer.softmax_log2(x, 3, -12, 43, 714, 30, 4, mask),
}


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_mask_leaves_the_softmax_of_the_rest(name: str, dtype: torch.dtype) -> None:
    softmax = SOFTMAXES[name]
    x = torch.stack([row("random", dtype, 20, seed) for seed in range(6)]).view(2, 3, 20)
    mask = torch.rand(3, 20) > 0.4
    mask[0], mask[1, 1:] = False, False
    mask[1, 0] = True
    found = softmax(x, mask)
    assert not found[:, 0].any(), "a row without any position is all 0"
    for batch in range(2):
        for index in (1, 2):
            part = mask[index]
            alone = softmax(x[batch, index][part], None)
            assert torch.equal(found[batch, index][part], alone)
            assert not found[batch, index][~part].any()
    assert torch.equal(softmax(x, torch.ones(20, dtype=torch.bool)), softmax(x, None))


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_of_any_shape_is_that_of_its_rows(name: str) -> None:
    softmax = SOFTMAXES[name]
    x = torch.randint(0, 256, (3, 700, 2, 90), dtype=torch.uint8).transpose(1, 2)
    found = softmax(x, None)
    assert found.shape == x.shape
    assert torch.equal(found[2, 1, 650:], softmax(x[2, 1, 650:], None))
    assert softmax(x[:0], None).shape == (0, 2, 700, 90)
    assert torch.equal(softmax(x[0, 0, 0], None), found[0, 0, 0])


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_refuses_other_types(name: str) -> None:
    with pytest.raises(CompileError, match=r"is torch\.float32"):
        SOFTMAXES[name](GOLDEN.float(), None)
    with pytest.raises(CompileError, match="must be bool"):
        SOFTMAXES[name](GOLDEN, torch.ones(5))
