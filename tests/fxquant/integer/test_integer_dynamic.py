from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.errors import CompileError, InputError
from fxquant.integer import gru_dynamic, linear_dynamic, lstm_dynamic
from fxquant.integer.dynamic import choose_qparams


def codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    # 7 bits, so that FBGEMM cannot saturate on a CPU without VNNI.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-63, 64, (rows, columns), generator=generator, dtype=torch.int8)


def scales(count: int) -> Tensor:
    return torch.linspace(0.001, 0.004, count)


def test_choose_qparams_agrees_with_fbgemm() -> None:
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-46, 31):
        for _ in range(20):
            pair = torch.randn(2, generator=generator) * 10.0**exponent
            pair[0] *= 10.0 ** float(torch.randn((), generator=generator))
            pair[0] *= torch.randint(0, 2, (), generator=generator)
            scale, zero_point = torch._choose_qparams_per_tensor(pair, False)
            found = choose_qparams(float(pair.min()), float(pair.max()))
            assert found == (float(torch.tensor(scale, dtype=torch.float32)), zero_point)


def test_choose_qparams_of_zeros_has_a_usable_scale() -> None:
    assert choose_qparams(0.0, 0.0) == (pytest.approx(0.1), 0)


@pytest.mark.parametrize("per_channel", [True, False])
def test_linear_is_exact_integer_arithmetic(per_channel: bool) -> None:
    x, weight = torch.randn(2, 3, 7), codes(5, 7)
    scale = scales(5) if per_channel else scales(5)[:1]
    bias = torch.randn(5)
    x_scale, zero_point = choose_qparams(float(x.min()), float(x.max()))
    inverse = 1 / torch.tensor(x_scale)
    q = ((x * inverse).round() + zero_point).clamp(0, 255).long() - zero_point
    sums = (q.unsqueeze(-2) * weight.long()).sum(-1)
    expected = sums.float() * (torch.tensor(x_scale) * scale) + bias
    assert torch.equal(linear_dynamic(x, weight, scale, bias), expected)


@pytest.mark.parametrize("features", [1, 6, 33, 400])
def test_linear_without_bias_is_fbgemms_bit_for_bit(features: int) -> None:
    x, weight, scale = torch.randn(9, features), codes(11, features), scales(11)
    assert torch.equal(linear_dynamic(x, weight, scale, None), _fbgemm(x, weight, scale, None))


def test_linear_with_bias_differs_from_fbgemm_by_one_rounding() -> None:
    x, weight, scale, bias = torch.randn(64, 50), codes(31, 50), scales(31), torch.randn(31)
    found, expected = (f(x, weight, scale, bias) for f in (linear_dynamic, _fbgemm))
    # FBGEMM adds the bias in a fused multiply-add: it does not round a·m, by 2^-24 of its size,
    # and then the two sums round by 2^-24 of theirs.
    product = (expected - bias).abs()
    assert ((found - expected).abs() <= 2.0**-23 * (product + expected.abs())).all()


def _fbgemm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from fxquant.backends.x86.kernels import pack_linear, quantized_weight

    packed = pack_linear(quantized_weight(weight, scale, None), bias)
    result: Tensor = torch.ops.quantized.linear_dynamic(x, packed)
    return result


def test_linear_takes_one_row_and_no_rows() -> None:
    weight, scale = codes(3, 4), scales(3)
    assert linear_dynamic(torch.randn(4), weight, scale, None).shape == (3,)
    assert linear_dynamic(torch.randn(0, 4), weight, scale, None).shape == (0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_an_input_that_is_not_finite(value: float) -> None:
    x = torch.tensor([[0.0, value]])
    with pytest.raises(InputError, match="NaN or infinite"):
        linear_dynamic(x, codes(3, 2), scales(3), None)


def test_refuses_another_float_type() -> None:
    with pytest.raises(CompileError, match="float64"):
        linear_dynamic(torch.zeros(1, 2, dtype=torch.float64), codes(3, 2), scales(3), None)


def test_refuses_sums_that_could_leave_int32() -> None:
    with pytest.raises(CompileError, match="accumulator"):
        linear_dynamic(
            torch.zeros(1, 70000),
            torch.full((1, 70000), 127, dtype=torch.int8),
            scales(1),
            None,
        )


# -- recurrent layers --------------------------------------------------------------------


def cell(gates: int, inputs: int, hidden: int, seed: int) -> list[Tensor]:
    rows = gates * hidden
    return [codes(rows, inputs, seed), codes(rows, hidden, seed + 1)]


def test_lstm_is_a_loop_over_linear_dynamic() -> None:
    x, weights = torch.randn(4, 2, 5), cell(4, 5, 3, 1)
    scale, biases = scales(12), [torch.randn(12), torch.randn(12)]
    h, c = h0, c0 = torch.randn(2, 3), torch.randn(2, 3)
    from_input = linear_dynamic(x, weights[0], scale, biases[0])
    steps = []
    for step in from_input:
        i, f, g, o = (linear_dynamic(h, weights[1], scale, biases[1]) + step).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(h)
    found = lstm_dynamic(x, [h0[None], c0[None]], weights, [scale] * 2, biases, 1, False, False)
    torch.testing.assert_close(found, (torch.stack(steps), h[None], c[None]), rtol=0, atol=0)


def test_gru_is_a_loop_over_linear_dynamic() -> None:
    x, weights, scale = torch.randn(4, 2, 5), cell(3, 5, 3, 1), scales(9)
    h = torch.zeros(2, 3)
    steps = []
    for step in linear_dynamic(x, weights[0], scale, None):
        hidden = linear_dynamic(h, weights[1], scale, None).chunk(3, 1)
        inputs = step.chunk(3, 1)
        reset, update = ((hidden[k] + inputs[k]).sigmoid() for k in range(2))
        new = (inputs[2] + hidden[2] * reset).tanh()
        h = (h - new) * update + new
        steps.append(h)
    found = gru_dynamic(x, [], weights, [scale] * 2, [], 1, False, False)
    torch.testing.assert_close(found, (torch.stack(steps), h[None]), rtol=0, atol=0)


def test_no_initial_state_means_zeros() -> None:
    x, weights, scale = torch.randn(4, 2, 5), cell(4, 5, 3, 1), [scales(12)] * 2
    zeros = [torch.zeros(1, 2, 3)] * 2
    torch.testing.assert_close(
        lstm_dynamic(x, [], weights, scale, [], 1, False, False),
        lstm_dynamic(x, zeros, weights, scale, [], 1, False, False),
        rtol=0,
        atol=0,
    )


def test_batch_first_swaps_the_dimensions_of_the_sequence_only() -> None:
    x, weights, scale = torch.randn(4, 2, 5), cell(3, 5, 3, 1), [scales(9)] * 2
    y, h = gru_dynamic(x, [], weights, scale, [], 1, False, False)
    swapped_y, swapped_h = gru_dynamic(x.transpose(0, 1), [], weights, scale, [], 1, False, True)
    assert torch.equal(swapped_y.transpose(0, 1), y)
    assert torch.equal(swapped_h, h)


def test_the_second_direction_runs_from_the_end() -> None:
    x, weights, scale = torch.randn(4, 2, 5), cell(3, 5, 3, 1), [scales(9)] * 4
    y, h = gru_dynamic(x, [], weights * 2, scale, [], 1, True, False)
    flipped, last = gru_dynamic(x.flip(0), [], weights, scale[:2], [], 1, False, False)
    assert torch.equal(y[..., 3:], flipped.flip(0))
    assert torch.equal(h[1], last[0])


def test_the_second_layer_reads_the_first() -> None:
    x, scale = torch.randn(4, 2, 5), [scales(9)] * 4
    first, second = cell(3, 5, 3, 1), cell(3, 3, 3, 3)
    y, h = gru_dynamic(x, [], [*first, *second], scale, [], 2, False, False)
    between, _ = gru_dynamic(x, [], first, scale[:2], [], 1, False, False)
    expected, last = gru_dynamic(between, [], second, scale[:2], [], 1, False, False)
    assert torch.equal(y, expected)
    assert torch.equal(h[1], last[0])


def test_refuses_an_empty_sequence() -> None:
    with pytest.raises(InputError, match="empty"):
        gru_dynamic(
            torch.zeros(0, 2, 5), [], cell(3, 5, 3, 1), [scales(9)] * 2, [], 1, False, False
        )
