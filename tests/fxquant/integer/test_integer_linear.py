from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import integer
from fxquant.errors import CompileError
from fxquant.integer.bounds import Bound, shifted_weight
from fxquant.integer.linear import exact_matmul_dtype
from fxquant.integer.rounding import channel_factors
from tests.fxquant.integer import plain

UINT8: dict[str, Any] = {"zero_point": 120, "qmin": 0, "qmax": 255, "dtype": torch.uint8}
FLOAT: dict[str, Any] = {
    "scale": 1.0,
    "zero_point": 0,
    "qmin": 0,
    "qmax": 0,
    "dtype": torch.float32,
}


def sums_of(x: torch.Tensor, zero_point: int, weight: torch.Tensor) -> Any:
    return (x.numpy().astype(np.int64) - zero_point) @ weight.numpy().astype(np.int64).T


@settings(max_examples=40, deadline=None)
@given(
    leading=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 5),
    zero_point=st.integers(0, 255),
    shifted=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_linear_equals_plain_integers(
    leading: tuple[int, ...], inputs: int, outputs: int, zero_point: int, shifted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = plain.uint8([*leading, inputs]), plain.int8([outputs, inputs])
    shifts = torch.randint(-128, 128, (outputs,), dtype=torch.int32) if shifted else None
    bias = torch.randint(-9999, 9999, (outputs,), dtype=torch.int32)
    scale = plain.scales(outputs)
    found = integer.linear(x, 0.02, zero_point, weight, scale, shifts, bias, scale=0.3, **UINT8)
    wide = weight.long() - (0 if shifts is None else shifts.long().unsqueeze(1))
    sums = sums_of(x, zero_point, wide) + bias.numpy().astype(np.int64)
    real = sums.astype(np.float32) * plain.multiplier(0.02, scale, 0.3)
    assert plain.same(found, plain.codes(real, 120, 0, 255))


def test_rounding_ties_go_to_the_even_code() -> None:
    x = torch.tensor([[1], [3], [5], [7]], dtype=torch.uint8)
    one = torch.ones(1, 1, dtype=torch.int8)
    output = {**UINT8, "zero_point": 1}
    found = integer.linear(x, 0.5, 0, one, torch.ones(1), None, None, scale=1.0, **output)
    # 0.5, 1.5, 2.5, 3.5 round to 0, 2, 2, 4; the odd zero point comes after the rounding.
    assert found.flatten().tolist() == [1, 3, 3, 5]


def test_saturates_at_both_ends_even_far_beyond_int32() -> None:
    x = torch.tensor([[0], [255]], dtype=torch.uint8)
    weight = torch.full((1, 1), 127, dtype=torch.int8)
    found = integer.linear(x, 1.0, 128, weight, torch.ones(1), None, None, scale=1e-30, **UINT8)
    assert found.flatten().tolist() == [0, 255]


def test_residual_does_not_fuse_its_multiply_adds() -> None:
    # As for the addition of two tensors: (10n + 5) · 0.1 − n is 0.5 when each product is rounded,
    # and a little more in a fused multiply-add. The accumulators are the biases of n channels.
    n = torch.arange(50, 256, dtype=torch.int32)
    found = integer.linear(
        torch.zeros(1, 1, dtype=torch.uint8), 1.0, 0, torch.zeros(len(n), 1, dtype=torch.int8),
        torch.tensor([0.1]), None, 10 * n + 5, scale=1.0, zero_point=0, qmin=0, qmax=255,
        dtype=torch.uint8, residual=(255 - n).byte().unsqueeze(0), residual_scale=1.0,
        residual_zero_point=255,
    )  # fmt: skip
    assert not found.any()
    fused = (10 * n + 5).double() * float(np.float32(0.1)) - n
    assert bool((fused.float().round() == 1).all()), "the case must tell the two apart"
    # The other way round: the residual's product is the one that must lose its excess.
    other = integer.linear(
        torch.zeros(1, 1, dtype=torch.uint8), 1.0, 0, torch.zeros(len(n), 1, dtype=torch.int8),
        torch.ones(1), None, -n, scale=1.0, zero_point=0, qmin=0, qmax=255, dtype=torch.uint8,
        residual=(10 * n + 5).to(torch.int16).unsqueeze(0), residual_scale=0.1,
        residual_zero_point=0,
    )  # fmt: skip
    assert not other.any()


def test_multipliers_are_computed_in_float64_and_rounded_once() -> None:
    weight_scale = torch.rand(10_000) * 0.01
    for x_scale, scale in ((0.1, 0.3), (0.0231, 0.77)):
        found = channel_factors(x_scale, weight_scale, scale)
        expected = plain.multiplier(x_scale, weight_scale, scale)
        assert torch.equal(found, torch.from_numpy(expected))
        in_float32 = weight_scale.numpy() * np.float32(x_scale) / np.float32(scale)
        assert (in_float32 != expected).any(), "the case must tell the two apart"


def test_carrier_is_float32_only_where_every_partial_sum_fits() -> None:
    def carrier(products: int, x_dtype: torch.dtype, zero_point: int, times: int) -> torch.dtype:
        weight = shifted_weight(torch.tensor([[-100, 100]], dtype=torch.int8), None) * times
        return exact_matmul_dtype(Bound(products, 0), x_dtype, zero_point, weight)

    assert carrier(2**24 - 1, torch.uint8, 0, 1) == torch.float32
    assert carrier(2**24, torch.uint8, 0, 1) == torch.float64
    assert carrier(100, torch.int16, 0, 1) == torch.float64
    # Beyond 256 a factor needs more bits than bfloat16 has.
    assert carrier(100, torch.uint8, -2, 1) == torch.float64
    assert carrier(100, torch.uint8, 0, 3) == torch.float64


@pytest.mark.parametrize("inputs", [300, 3000])
def test_exact_under_reduced_matmul_precision_and_autocast(inputs: int) -> None:
    x, weight = plain.uint8([64, inputs]), plain.int8([64, inputs])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = integer.linear(x, 1.0, 128, weight, torch.ones(1), None, None, **FLOAT)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = torch.from_numpy(sums_of(x, 128, weight)).to(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_large_accumulators_round_once_to_float32() -> None:
    x = torch.full((1, 1000), 255, dtype=torch.uint8)
    weight = torch.full((1, 1000), 127, dtype=torch.int8)
    bias = torch.tensor([1], dtype=torch.int32)
    found = integer.linear(x, 1.0, 0, weight, torch.ones(1), None, bias, **FLOAT)
    assert float(found) == float(np.float32(255 * 127 * 1000 + 1))


def test_the_longest_sum_that_int32_holds_is_accepted_and_the_next_is_refused() -> None:
    # 255 · 128 · 65793 = 2147483520 <= 2^31 − 1, one product more is not.
    for length, fits in ((65793, True), (65794, False)):
        x = torch.full((1, length), 255, dtype=torch.uint8)
        weight = torch.full((1, length), -128, dtype=torch.int8)
        args = (x, 1.0, 0, weight, torch.ones(1), None, None)
        if fits:
            assert float(integer.linear(*args, **FLOAT)) == float(np.float32(-2147483520))
        else:
            with pytest.raises(CompileError, match="channel 0 can reach the accumulator"):
                integer.linear(*args, **FLOAT)


def test_a_bias_clamped_to_largest_bias_is_accepted() -> None:
    x, weight = plain.uint8([2, 3]), plain.int8([2, 3])
    weight[1] = 0
    largest = integer.largest_bias(weight, None, torch.uint8, 10)
    assert int(largest[1]) == 2**31 - 1
    # q − z lies in [−10, 245], and the weights' signs decide which end is worse.
    worst = max(
        abs(sum(int(w) * end[int(w) > 0] for w in weight[0])) for end in ((-10, 245), (245, -10))
    )
    assert int(largest[0]) == 2**31 - 1 - worst
    args = (x, 1.0, 10, weight, torch.ones(1), None)
    integer.linear(*args, largest.int(), scale=1.0, **UINT8)
    with pytest.raises(CompileError, match="largest_bias"):
        integer.linear(*args, torch.full((2,), 2**31 - 1).int(), scale=1.0, **UINT8)


def test_largest_bias_of_a_transposed_weight_is_for_output_channels() -> None:
    weight = plain.int8([4, 3, 2])
    shifts = torch.arange(6, dtype=torch.int32)
    largest = integer.largest_bias(weight, shifts, torch.uint8, 0, transposed=True, groups=2)
    for o in range(6):
        first = o // 3 * 2
        taps = [int(weight[i, o % 3, t]) - o for i in (first, first + 1) for t in range(2)]
        reach = max(sum(w for w in taps if w > 0), -sum(w for w in taps if w < 0))
        assert int(largest[o]) == 2**31 - 1 - 255 * reach


def test_float_input_is_refused() -> None:
    with pytest.raises(CompileError, match=r"input is torch\.float32"):
        integer.linear(
            torch.ones(1, 2), 1.0, 0, plain.int8([1, 2]), torch.ones(1), None, None, **FLOAT
        )
