from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import integer
from fxquant.errors import CompileError
from tests.fxquant.integer import plain_transformer as plain

BOUNDED = settings(max_examples=150, deadline=None)
INT16 = (0, -32767, 32767, torch.int16)
INT32 = (0, -(2**31), 2**31 - 1, torch.int32)
MULTIPLIERS = st.one_of(
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.sampled_from([0, 1, -1, 2**30, 2**31 - 1, -(2**31) + 1]),
)
SHIFTS = st.integers(0, 62)
INPUTS = st.one_of(
    *(st.integers(-(2**bits), 2**bits) for bits in (4, 16, 31, 40, 52)),
    st.sampled_from([0, 2**52, -(2**52), 2**31 - 1, -(2**31)]),
)


def one(value: int) -> torch.Tensor:
    return torch.tensor([value])


@BOUNDED
@given(st.floats(1e-30, 2.0**31, exclude_max=True), st.booleans())
def test_dyadic_is_the_nearest_of_31_bits(ratio: float, negative: bool) -> None:
    try:
        multiplier, shift = integer.dyadic(-ratio if negative else ratio)
    except CompileError:
        assert ratio > 2**31 - 1
        return
    assert (multiplier <= 0) is negative or not multiplier
    assert abs(multiplier) < 2**31
    assert 0 <= shift <= 62
    assert shift == 62 or abs(multiplier) >= 2**30
    found = Fraction(abs(multiplier), 2**shift)
    assert abs(found - Fraction(ratio)) <= Fraction(1, 2 ** (shift + 1))
    # The formula itself, wherever it applies as it stands.
    fraction, exponent = math.frexp(ratio)
    formula = math.floor(Fraction(fraction) * 2**31 + Fraction(1, 2))
    if 31 - exponent <= 62 and formula < 2**31:
        assert (abs(multiplier), shift) == (formula, 31 - exponent)


def test_dyadic_of_the_extremes() -> None:
    assert integer.dyadic(0.0)[0] == 0
    assert integer.dyadic(1.0) == (2**30, 30)
    assert integer.dyadic(1 - 2.0**-53) == (2**30, 30)
    assert integer.dyadic(2.0**-62) == (1, 62)
    assert integer.dyadic(2.0**-63) == (1, 62)
    assert integer.dyadic(2.0**-63 * (1 - 2.0**-53)) == (0, 62)
    assert integer.dyadic(1e-300) == (0, 62)


@pytest.mark.parametrize("ratio", [2.0**31, 2.0**31 - 2.0**-20, math.inf, math.nan, -(2.0**31)])
def test_dyadic_refuses_what_it_cannot_hold(ratio: float) -> None:
    with pytest.raises(CompileError, match="check the scales"):
        integer.dyadic(ratio)


def test_dyadic_tensors_are_dyadic_of_each_element() -> None:
    ratios = torch.tensor([[0.3, -7.0], [1e-9, 0.0]], dtype=torch.float64)
    multipliers, shifts = integer.dyadic_tensors(ratios)
    assert multipliers.dtype == shifts.dtype == torch.int64
    pairs = zip(multipliers.flatten().tolist(), shifts.flatten().tolist(), strict=True)
    assert list(pairs) == [integer.dyadic(ratio) for ratio in ratios.flatten().tolist()]


@BOUNDED
@given(st.lists(INPUTS, min_size=1, max_size=20), MULTIPLIERS, SHIFTS, st.integers(-128, 255))
def test_rescale_equals_unbounded_arithmetic(
    values: list[int], multiplier: int, shift: int, zero_point: int
) -> None:
    x = torch.tensor(values)
    for grid in (INT16, INT32, (zero_point, 0, 255, torch.uint8)):
        found = integer.rescale(x, 0, one(multiplier), one(shift), -1, *grid)
        assert found.dtype == grid[3]
        assert found.tolist() == [plain.rescaled(v, multiplier, shift, *grid[:3]) for v in values]


@pytest.mark.parametrize("shift", range(1, 63))
def test_rescale_of_ties_goes_to_even(shift: int) -> None:
    # x · m is an odd multiple of 2^(e−1), with few or many of these factors 2 in x.
    for in_x in {min(shift - 1, 49), max(shift - 31, 0), (shift - 1) // 2}:
        in_m = shift - 1 - in_x
        if in_m > 30:
            continue
        ties = torch.tensor([-5, -3, -1, 1, 3, 5]) << in_x
        found = integer.rescale(ties, 0, one(1 << in_m), one(shift), -1, *INT16)
        assert found.tolist() == [-2, -2, 0, 0, 2, 2]
        for values in ((ties - 1).tolist(), (ties + 1).tolist()):
            near = integer.rescale(torch.tensor(values), 0, one(1 << in_m), one(shift), -1, *INT16)
            expected = [plain.rescaled(v, 1 << in_m, shift, *INT16[:3]) for v in values]
            assert near.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_rescale_over_all_codes_and_zero_points(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.arange(info.min, info.max + 1).to(dtype)
    for x_zero_point in (info.min, -3, 128, 255):
        for multiplier, shift in ((2**30, 31), (1234567890, 28), (-1234567890, 31), (2**30, 30)):
            found = integer.rescale(
                x, x_zero_point, one(multiplier), one(shift), 0, 7, 0, 255, torch.uint8
            )
            centered = [q - x_zero_point for q in x.tolist()]
            expected = [plain.rescaled(q, multiplier, shift, 7, 0, 255) for q in centered]
            assert found.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_rescale_of_the_ends_of_a_type(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.tensor([info.min, -1, 0, 1, info.max], dtype=dtype)
    for shift in range(63):
        found = integer.rescale(x, 5, one(2**31 - 1), one(shift), -1, *INT32)
        assert found.tolist() == [
            plain.rescaled(q - 5, 2**31 - 1, shift, *INT32[:3]) for q in x.tolist()
        ]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("largest", [2**20, 2**45])
def test_rescale_along_an_axis(axis: int, largest: int) -> None:
    x = torch.randint(-largest, largest, (3, 4, 5))
    channels = x.shape[axis]
    multiplier = torch.randint(-(2**31) + 1, 2**31, (channels,))
    shift = torch.randint(0, 63, (channels,))
    found = integer.rescale(x, 3, multiplier, shift, axis, *INT32)
    for index in range(channels):
        part = x.select(axis, index)
        alone = integer.rescale(part, 3, multiplier[index : index + 1], shift[index : index + 1],
                                -1, *INT32)  # fmt: skip
        assert torch.equal(found.select(axis, index), alone)
        pair = int(multiplier[index]), int(shift[index])
        expected = [plain.rescaled(v - 3, *pair, *INT32[:3]) for v in part.flatten().tolist()]
        assert alone.flatten().tolist() == expected


def test_rescale_in_parts_and_other_layouts_changes_nothing() -> None:
    x = torch.randint(-(2**45), 2**45, (2, 8, 300, 40))
    multiplier, shift = torch.randint(2**30, 2**31, (8,)), torch.randint(40, 60, (8,))
    rest = (multiplier, shift, 1, *INT16)
    found = integer.rescale(x, 0, *rest)
    strided = x.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(integer.rescale(strided, 0, *rest), found)
    assert torch.equal(integer.rescale(x[:, :, ::7], 0, *rest), found[:, :, ::7])
    assert torch.equal(integer.rescale(x[1:, :, :5], 0, *rest), found[1:, :, :5])
    empty = integer.rescale(x[:0], 0, *rest)
    assert empty.shape == (0, 8, 300, 40)


@BOUNDED
@given(
    st.lists(st.tuples(INPUTS, INPUTS), min_size=1, max_size=10),
    st.tuples(MULTIPLIERS, SHIFTS, MULTIPLIERS, SHIFTS),
    st.integers(0, 255),
)
def test_add_rescaled_rounds_each_branch_on_its_own(
    values: list[tuple[int, int]], factors: tuple[int, int, int, int], zero_point: int
) -> None:
    a, b = (torch.tensor(column) for column in zip(*values, strict=True))
    found = integer.add_rescaled(
        a, 0, *factors[:2], b, 0, *factors[2:], zero_point, 0, 255, torch.uint8
    )
    limit = 2**33
    expected = [
        plain.rescaled(x, *factors[:2], 0, -limit, limit)
        + plain.rescaled(y, *factors[2:], 0, -limit, limit)
        + zero_point
        for x, y in values
    ]
    assert found.tolist() == [min(max(total, 0), 255) for total in expected]


def test_add_rescaled_broadcasts_and_takes_zero_points() -> None:
    a = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    b = torch.tensor([[-1], [9]], dtype=torch.int16)
    half = integer.dyadic(0.5)
    found = integer.add_rescaled(a, 2, *half, b, 1, *integer.dyadic(2.0), 1, -127, 127, torch.int8)
    # round_half_even((q − 2)/2) of 0..5 is −1, 0, 0, 0, 1, 2 and 2·(q − 1) is −4 and 16.
    assert found.tolist() == [[[-4, -3, -3], [17, 18, 19]]]
    other = integer.add_rescaled(b, 1, *integer.dyadic(2.0), a, 2, *half, 1, -127, 127, torch.int8)
    assert torch.equal(found, other)


def test_rescale_refuses_what_it_cannot_represent() -> None:
    x = torch.tensor([1])
    good = one(2**30), one(30)
    for multiplier, shift in ((2**31, 30), (-(2**31), 30), (1, -1), (1, 63)):
        with pytest.raises(CompileError, match="needed are"):
            integer.rescale(x, 0, one(multiplier), one(shift), -1, *INT16)
    with pytest.raises(CompileError, match="along dimension"):
        integer.rescale(x.repeat(6), 0, good[0].repeat(3), good[1], 0, *INT16)
    with pytest.raises(CompileError, match="must be int64"):
        integer.rescale(x, 0, good[0].int(), good[1], -1, *INT16)
    with pytest.raises(CompileError, match="above 2"):
        integer.rescale(torch.tensor([2**52 + 1]), 0, *good, -1, *INT16)
    with pytest.raises(CompileError, match="integers only"):
        integer.rescale(x.float(), 0, *good, -1, *INT16)
    with pytest.raises(CompileError, match="the output is"):
        integer.rescale(x, 0, *good, -1, 0, 0, 1, torch.float32)
    with pytest.raises(CompileError, match="are no"):
        integer.rescale(x, 0, *good, -1, 0, 0, 256, torch.uint8)
