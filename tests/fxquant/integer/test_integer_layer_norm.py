from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import integer
from fxquant.errors import CompileError
from fxquant.integer.roots import INVERSE_ROOT_ERROR, bit_length, integer_square_root, inverse_root
from tests.fxquant.integer import plain_transformer as plain
from tests.fxquant.integer.rows import ROWS, row

BOUNDED = settings(max_examples=60, deadline=None)
GOLDEN = torch.tensor([100, -50, 25, 7, -80, 0, 33, -35], dtype=torch.int8)
GOLDEN_NORMALIZED = [
    715827850, -357913925, 178956962, 50107949, -572662280, 0, 236223190, -250539748
]  # fmt: skip
ZERO_POINTS = st.integers(-128, 255)


def exact(values: list[int]) -> list[float]:
    """The normalized values of integers, without an epsilon, in floats of exact fractions."""
    size, total = len(values), sum(values)
    variance = size * sum(q * q for q in values) - total**2
    return [(size * q - total) / math.sqrt(variance) if variance else 0.0 for q in values]


@pytest.mark.parametrize(
    "v", [*(2**k + d for k in range(60, 62) for d in (0, 1, 12345)), 2**62 - 1, 2**61 - 1]
)
def test_integer_square_root_is_exact(v: int) -> None:
    root = math.isqrt(v)
    near = torch.tensor([v, root**2, (root + 1) ** 2 - 1]).clamp(2**60, 2**62 - 1)
    assert integer_square_root(near).tolist() == [math.isqrt(x) for x in near.tolist()]


@BOUNDED
@given(st.lists(st.integers(2**30, 2**31 - 1), min_size=1, max_size=50))
def test_integer_square_root_beside_squares_is_exact(roots: list[int]) -> None:
    squares = [root**2 + d for root in roots for d in (-1, 0, 1)]
    found = integer_square_root(torch.tensor(squares).clamp(2**60, 2**62 - 1))
    assert found.tolist() == [math.isqrt(min(max(v, 2**60), 2**62 - 1)) for v in squares]


@pytest.mark.parametrize("bits", range(63))
def test_bit_length_is_exact_beside_powers_of_two(bits: int) -> None:
    values = [v for v in (2**bits - 1, 2**bits, 2**bits + 1) if v < 2**63]
    assert bit_length(torch.tensor(values)).tolist() == [v.bit_length() for v in values]


@BOUNDED
@given(st.integers(1, 62).flatmap(lambda k: st.integers(2 ** (k - 1), 2**k - 1)))
def test_inverse_root_stays_in_its_bound(v: int) -> None:
    factor, exponent = (int(part) for part in inverse_root(torch.tensor([v])))
    assert factor <= 2**22
    assert abs(factor * math.sqrt(v) / 2**exponent - 1) <= INVERSE_ROOT_ERROR
    assert plain.inverse_root(v) == plain.Fraction(factor, 2**exponent)


def test_inverse_root_of_zero_is_zero() -> None:
    assert int(inverse_root(torch.tensor([0]))[0]) == 0


def test_golden_layer_norm() -> None:
    found = integer.layer_norm_i_vit(GOLDEN, 0, None, 1)
    assert torch.equal(found, torch.tensor(GOLDEN_NORMALIZED))
    scale = integer.layer_norm_scale("i-vit", 8)
    assert scale == math.sqrt(8) / 2**30
    bias = integer.layer_norm_bias(torch.full((8,), 0.5), torch.ones(8), scale)
    assert torch.equal(bias, torch.full((8,), 189812531))
    found = integer.layer_norm_i_vit(GOLDEN, 0, bias, 1)
    assert torch.equal(found, torch.tensor(GOLDEN_NORMALIZED) + 189812531)


@BOUNDED
@given(ROWS, ZERO_POINTS, st.integers(-(2**51), 2**51))
def test_layer_norm_i_vit_equals_unbounded_arithmetic(x: Tensor, zero: int, summand: int) -> None:
    bias = torch.full((len(x),), summand)
    found = integer.layer_norm_i_vit(x, zero, bias, 1)
    expected = plain.layer_norm_i_vit([q - zero for q in x.tolist()], bias.tolist())
    assert found.tolist() == expected
    assert max(abs(value - summand) for value in expected) <= 2**30


@BOUNDED
@given(ROWS)
def test_layer_norm_i_vit_stays_in_its_bound_where_ten_steps_converge(x: Tensor) -> None:
    size = len(x)
    values = x.tolist()
    mean = round(plain.Fraction(sum(values), size))
    v = sum((q - mean) ** 2 for q in values)
    if v < 2**16:
        return
    found = integer.layer_norm_i_vit(x, 0, None, 1) * integer.layer_norm_scale("i-vit", size)
    deviation = math.sqrt(v / size)
    for value, normal in zip(found.tolist(), exact(values), strict=True):
        # A mean that is off by θ ≤ ½ moves a value by θ/σ', and σ'² = σ² + θ² shrinks it by at most
        # θ²/(2σ²) ≤ 1/(8σ²). k is within 1 of √v, ⌊(2^31 − 1)/k⌋ loses less than k/2^31, and the
        # last floor a step.
        moved = 0.5 / deviation + abs(normal) / (8 * max(deviation**2 - 0.25, 1e-9))
        size_of_it = abs(normal) + moved
        bound = moved + size_of_it * (1.001 / math.sqrt(v) + (math.sqrt(v) + 1) / 2**31)
        assert abs(value - normal) <= bound + math.sqrt(size) / 2**30 + 1e-12


@BOUNDED
@given(ROWS, ZERO_POINTS, st.integers(-(2**51), 2**51))
def test_layer_norm_integer_equals_unbounded_arithmetic_and_stays_in_its_bound(
    x: Tensor, zero: int, summand: int
) -> None:
    bias = torch.full((len(x),), summand)
    found = integer.layer_norm_integer(x, zero, bias, 1)
    values = x.tolist()
    assert found.tolist() == plain.layer_norm_integer(values, bias.tolist())
    for value, normal in zip((found - summand).tolist(), exact(values), strict=True):
        target = normal * 2**20
        assert abs(value - target) <= 0.5 + INVERSE_ROOT_ERROR * abs(target) + 1e-3
        assert abs(value) <= 2**20 * math.sqrt(len(x)) + 1


@pytest.mark.parametrize("spread", [1, 7, 300, 32767])
@pytest.mark.parametrize("size", [64, 192, 1024])
def test_layer_norm_integer_is_within_2_to_the_minus_12(spread: int, size: int) -> None:
    x = torch.randint(-spread, spread + 1, (50, size)).short()
    found = integer.layer_norm_integer(x, 0, None, 1) * integer.layer_norm_scale("integer", size)
    expected = F.layer_norm(x.double(), (size,), eps=0)
    # Half a step of 2^-20 is that much of all but the values below 2^-9.
    large = expected.abs() > 2.0**-9
    assert float(((found - expected) / expected)[large].abs().max()) < 2.0**-11.9
    assert float((found - expected).abs().max()) < 2.0**-18


def test_layer_norm_over_all_codes() -> None:
    x = torch.arange(256, dtype=torch.uint8)
    pairs = torch.stack([x.repeat_interleave(256), x.repeat(256)], 1)
    found = integer.layer_norm_integer(pairs, 0, None, 1)
    # Of two values the normalized ones are −1 and 1, whatever they are.
    sign = (pairs[:, 0].int() - pairs[:, 1].int()).sign().long()
    assert torch.equal(found[:, 0], -found[:, 1])
    assert int((found[:, 0] - sign * 2**20).abs().max()) <= 1
    triples = torch.stack([x, x.flip(0), x], 1)
    published = integer.layer_norm_i_vit(triples, 7, None, 1)
    rows = [plain.layer_norm_i_vit([q - 7 for q in r], None) for r in triples.tolist()]
    assert published.tolist() == rows


@BOUNDED
@given(ROWS, ZERO_POINTS, st.integers(0, 2**30))
def test_layer_norm_power_of_two_equals_unbounded_arithmetic(
    x: Tensor, zero: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(0, 16, (len(x),), generator=generator)
    found = integer.layer_norm_power_of_two(x, zero, shifts, None, 1)
    expected = plain.layer_norm_power_of_two([q - zero for q in x.tolist()], shifts.tolist())
    assert found.tolist() == expected


def test_power_of_two_without_rounding_is_the_integer_layer_norm() -> None:
    x = torch.randint(-127, 128, (5, 16), dtype=torch.int8)
    shifts, bias = torch.arange(16) % 4, torch.arange(16)
    wide = x.short() << shifts.short()
    found = integer.layer_norm_power_of_two(wide, 0, shifts, bias, 1)
    assert torch.equal(found, integer.layer_norm_integer(wide, 0, bias, 1))


NORMS: dict[str, Any] = {
    "i-vit": integer.layer_norm_i_vit,
    "integer": integer.layer_norm_integer,
    "power_of_two": lambda x, zero, bias, dims: integer.layer_norm_power_of_two(
        x, zero, torch.arange(x.shape[-1]) % 3, bias, dims
    ),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", ["equal", "one_hot", "cold_hot", "lowest", "highest"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_degenerate_rows_are_finite_and_sized(name: str, kind: str, dtype: torch.dtype) -> None:
    # In 16 bits FQ-ViT's factors must hold the codes, and these shifts clamp them.
    for length in (1, 2, 197, 4096):
        x = row(kind, dtype, length, 5)
        found = NORMS[name](x, 3, None, 1) * integer.layer_norm_scale(name, length)
        assert float(found.abs().max()) <= math.sqrt(length) + 1e-5
        if kind in ("equal", "lowest", "highest") and name != "power_of_two":
            assert not found.any()


@pytest.mark.parametrize("name", NORMS)
def test_layer_norm_over_several_dimensions_and_layouts(name: str) -> None:
    norm = NORMS[name]
    x = torch.randint(-128, 128, (3, 6, 700, 5), dtype=torch.int8).transpose(1, 2)
    bias = torch.arange(30).view(6, 5)
    found = norm(x, 2, bias, 2)
    assert found.dtype == torch.int64
    assert found.shape == x.shape
    if name != "power_of_two":
        flat = norm(x.reshape(3, 700, 30), 2, bias.flatten(), 1)
        assert torch.equal(found.flatten(2), flat)
    assert torch.equal(found[2, 650:], norm(x[2, 650:], 2, bias, 2))
    assert torch.equal(found - bias, norm(x, 2, None, 2))
    assert norm(x[:0], 2, bias, 2).shape == (0, 700, 6, 5)


def test_guarded_gamma_keeps_what_is_large_and_moves_what_is_not() -> None:
    gamma = torch.tensor([2.0, -1.0, 0.0, -1e-9, 1e-9])
    least = 2.0 * 2**-12
    assert integer.guarded_gamma(gamma).tolist() == [2.0, -1.0, least, -least, least]
    assert bool((integer.guarded_gamma(torch.zeros(3)) > 0).all())


def test_bias_and_gamma_reach_the_affine_layer_norm() -> None:
    x = torch.randint(-32767, 32768, (20, 192)).short()
    gamma, beta = torch.randn(192, dtype=torch.float64), torch.randn(192, dtype=torch.float64)
    guarded = integer.guarded_gamma(gamma)
    expected = F.layer_norm(x.double(), (192,), gamma, beta, eps=0)
    for name in ("i-vit", "integer"):
        scale = integer.layer_norm_scale(name, 192)
        bias = integer.layer_norm_bias(beta, guarded, scale)
        found = NORMS[name](x, 0, bias, 1) * (guarded * scale)
        assert float((found - expected).abs().max()) < 2e-3


def test_layer_norm_bias_saturates_where_rescale_still_takes_it() -> None:
    bias = integer.layer_norm_bias(torch.tensor([1e9, -1e9]), torch.tensor([1e-9, 1e-9]), 2.0**-20)
    assert bias.tolist() == [2**51, -(2**51)]
    x = torch.tensor([-128, 127], dtype=torch.int8)
    found = integer.layer_norm_integer(x, 0, bias, 1)
    one = torch.tensor([1]), torch.tensor([62])
    integer.rescale(found, 0, *one, -1, 0, -127, 127, torch.int8)


def test_layer_norms_refuse_what_has_no_meaning() -> None:
    x = torch.zeros(2, 4, dtype=torch.int16)
    for norm in NORMS.values():
        for bias, dims in ((torch.zeros(3), 1), (None, 3), (None, 0)):
            with pytest.raises(CompileError, match="do not match"):
                norm(x, 0, bias, dims)
        with pytest.raises(CompileError, match="input is"):
            norm(x.float(), 0, None, 1)
        with pytest.raises(CompileError, match="too long"):
            norm(torch.zeros(1, dtype=torch.int16).expand(1, 70000), 0, None, 1)
    for shifts in (torch.tensor([0, 0, 0, 16]), torch.tensor([0, 0, 0, -1]), torch.zeros(3).long()):
        with pytest.raises(CompileError, match="needs a shift"):
            integer.layer_norm_power_of_two(x, 0, shifts, None, 1)
    with pytest.raises(CompileError, match="no layer norm 'float'"):
        integer.layer_norm_scale("float", 4)


@BOUNDED
@given(ROWS, ZERO_POINTS)
def test_normalize_equals_unbounded_arithmetic_and_stays_in_its_bound(x: Tensor, zero: int) -> None:
    found = integer.normalize_integer(x, zero, 0)
    values = [q - zero for q in x.tolist()]
    assert found.dtype == torch.int16
    assert found.tolist() == plain.normalize_integer(values)
    norm = math.sqrt(sum(y * y for y in values))
    for value, y in zip(found.tolist(), values, strict=True):
        target = 2**15 * y / norm if norm else 0.0
        bound = 0.5 + INVERSE_ROOT_ERROR * abs(target) + 1e-9
        assert abs(value - max(min(target, 32767), -32767)) <= bound


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_normalize_along_any_dimension(dim: int) -> None:
    x = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    found = integer.normalize_integer(x, 128, dim).movedim(dim, -1)
    rows = x.movedim(dim, -1).flatten(0, 1)
    expected = [plain.normalize_integer([q - 128 for q in r]) for r in rows.tolist()]
    assert found.flatten(0, 1).tolist() == expected


def test_normalize_refuses_sums_beyond_float64() -> None:
    with pytest.raises(CompileError, match="too many"):
        integer.normalize_integer(torch.zeros(1, dtype=torch.int16).expand(2**23), 0, 0)
