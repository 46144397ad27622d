from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fxquant.kernels
from fxquant import integer
from fxquant.kernels import OPERATORS, Operator, register, schema
from fxquant.kernels.fakes import Call

OPS: Any = torch.ops.fxquant
OUT: tuple[Any, ...] = (0.3, 100, 0, 255, torch.uint8)
X = torch.arange(2 * 4 * 5 * 6, dtype=torch.uint8).view(2, 4, 5, 6)
LAST = X.contiguous(memory_format=torch.channels_last)
XQ: tuple[Any, ...] = (0.02, 7)
WEIGHT = torch.arange(-72, 72, dtype=torch.int8).view(4, 4, 3, 3)
DEPTHWISE = WEIGHT[:, :1].contiguous()
SCALE = torch.tensor([0.01, 0.02, 0.03, 0.04])
BIAS = torch.tensor([1, -2, 300, 4], dtype=torch.int32)
ROWS = WEIGHT.flatten(1)[:, :6].contiguous()
GEOMETRY: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1])
GRID: tuple[Any, ...] = (100, 0, 255, torch.uint8)
MULTIPLIER, SHIFT = torch.tensor([2**30, -5, 2**31 - 1, 7]), torch.tensor([37, 2, 38, 0])
POOL: tuple[Any, ...] = ([3, 3], [2, 2], [1, 1], True, False, None)

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("quantize", (X.float(), *OUT)),
    ("dequantize", (X, *XQ)),
    ("dequantize_weight", (WEIGHT, SCALE, None, 0)),
    ("conv", (X, *XQ, WEIGHT, SCALE, None, BIAS, *GEOMETRY, 1, *OUT)),
    ("conv", (LAST, *XQ, DEPTHWISE, SCALE, BIAS, None, *GEOMETRY, 4, *OUT, X, 0.1, 3)),
    ("conv", (X[0], *XQ, WEIGHT[:, :, :1, :1], SCALE[:1], None, None, [2, 2], [0, 0], [1, 1], 1,
              1.0, 0, 0, 0, torch.float32)),
    ("conv_transpose", (LAST, *XQ, WEIGHT, SCALE, None, BIAS, [2, 2], [1, 1], [1, 1], 1, [1, 1],
                        *OUT)),
    ("linear", (X, *XQ, ROWS, SCALE, None, BIAS, *OUT)),
    ("add", (X, *XQ, LAST, 0.1, 9, *OUT)),
    ("mul", (X, *XQ, X[:, :, :1, :1], 0.1, 9, *OUT)),
    ("channel_affine", (LAST, *XQ, SCALE, SCALE, *OUT)),
    ("lookup", (LAST, torch.arange(256, dtype=torch.uint8).flip(0))),
    ("max_pool", (LAST, [3, 2], [2, 2], [1, 0], [1, 2], True)),
    ("avg_pool", (LAST, *XQ, *POOL, *OUT)),
    ("adaptive_avg_pool", (LAST, *XQ, [2, 3], *OUT)),
    ("mean", (X, *XQ, [2, 3], False, *OUT)),
    ("linear_dynamic", (X.float(), ROWS, SCALE, SCALE)),
    ("lstm_dynamic", (X.float()[:, :, 0], [], [ROWS, ROWS[:, :1]] * 2, [SCALE] * 4, [SCALE] * 4, 1,
                      True, True)),
    ("gru_dynamic", (X.float()[:, :, 0], [torch.ones(1, 4, 1)], [ROWS[:3], ROWS[:3, :1]],
                     [SCALE[:3]] * 2, [], 1, False, False)),
    ("matmul", (X, *XQ, X.transpose(2, 3), 0.1, 9, 0.5, *OUT)),
    ("matmul", (X, *XQ, ROWS.t(), 0.1, 9, 0.5, 1.0, 0, 0, 0, torch.float32)),
    ("weighted_mean", (X, 0, X.transpose(2, 3), 0.1, 9, *OUT)),
    ("linear_accumulate", (X, 7, ROWS, None, BIAS)),
    ("conv_accumulate", (LAST, 7, WEIGHT, None, BIAS, *GEOMETRY, 1)),
    ("conv_accumulate", (X.short(), 7, DEPTHWISE, None, None, *GEOMETRY, 4)),
    ("matmul_accumulate", (X, 7, X.short().transpose(2, 3), 9)),
    ("mul_accumulate", (LAST, 7, X[:, :, :1, :1], 9)),
    ("sum_accumulate", (X, 7, [2, 3], False)),
    ("rescale", (LAST, 7, MULTIPLIER, SHIFT, 1, *GRID)),
    ("rescale", (X.long() << 44, 7, MULTIPLIER[:1], SHIFT[:1], -1, *GRID)),
    ("add_rescaled", (LAST, 7, 2**30, 30, LAST, 9, 2**30, 31, *GRID)),
    ("add_rescaled", (X[:, :1], 7, 2**30, 30, LAST, 9, 2**30, 31, *GRID)),
    ("softmax_i_vit", (LAST, 7, -16, 15, 8, None)),
    ("softmax_table", (X, integer.exp_table(0.1), 65280, 0, 255, torch.uint8, X[:1] > 9)),
    ("softmax_log2", (X, 7, -12, 43, 714, 30, 4, X > 9)),
    ("gelu_i_vit", (X, 7, -10, 23, 8)),
    ("layer_norm_i_vit", (LAST, 7, None, 2)),
    ("layer_norm_integer", (X, 7, torch.arange(6), 1)),
    ("layer_norm_power_of_two", (X, 7, torch.arange(6), torch.arange(6), 1)),
    ("normalize_integer", (LAST, 7, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_opcheck(name: str, args: tuple[Any, ...]) -> None:
    # The AOT test compiles with symbolic shapes: a second for each operator, and it adds nothing
    # to the fake-tensor test for operators without gradients.
    torch.library.opcheck(
        getattr(OPS, name).default,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_every_operator_is_called_above() -> None:
    assert {name for name, _ in CALLS} == {operator.name for operator in OPERATORS}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_schema_is_the_signature_of_the_implementation(operator: Operator) -> None:
    arguments = getattr(OPS, operator.name).default._schema.arguments
    parameters = inspect.signature(operator.implementation).parameters.values()
    assert [(argument.name, argument.default_value) for argument in arguments] == [
        (p.name, None if p.default is inspect.Parameter.empty else p.default) for p in parameters
    ]
    assert "SymInt" not in str(getattr(OPS, operator.name).default._schema)


def test_an_operator_is_one_function_and_one_row() -> None:
    def doubled(x: torch.Tensor, dtype: torch.dtype, times: int = 1) -> torch.Tensor:
        """Twice as large as often as asked."""
        return (x.long() << times).to(dtype)

    def fake(call: Call) -> torch.Tensor:
        return torch.empty_like(call.x, dtype=call.dtype)

    register([Operator(doubled, fake)])
    assert str(OPS.doubled.default._schema) == (
        "fxquant::doubled(Tensor x, ScalarType dtype, int times=1) -> Tensor"
    )
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.doubled.default, (X, torch.int32), test_utils=checks)
    assert torch.equal(OPS.doubled(X, torch.int32, times=3), 8 * X.int())


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_operators_are_the_reference_functions(name: str, args: tuple[Any, ...]) -> None:
    operator = next(operator for operator in OPERATORS if operator.name == name)
    found, expected = getattr(OPS, name)(*args), operator.implementation(*args)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_importing_again_is_harmless() -> None:
    before = OPS.lookup.default
    importlib.reload(schema)
    importlib.reload(fxquant.kernels)
    schema.register()
    assert OPS.lookup.default is before
    table = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(OPS.lookup(X, table), X)


def test_shapes_propagate_with_a_symbolic_batch() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = OPS.conv(x, *XQ, WEIGHT, SCALE, None, BIAS, *GEOMETRY, 1, *OUT)
        y = OPS.add(y, 0.3, 100, y, 0.3, 100, *OUT)
        y = OPS.avg_pool(y, 0.3, 100, *POOL, *OUT)
        return OPS.mean(y, 0.3, 100, [2, 3], False, *OUT)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    x = mode.from_tensor(X, static_shapes=False)
    with mode:
        result = forward(x)
    assert result.dtype == torch.uint8
    assert result.shape[1] == 4
    assert not isinstance(result.shape[0], int), "the batch size must stay symbolic"


def test_attention_shapes_propagate_with_a_symbolic_batch() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def forward(x: torch.Tensor) -> torch.Tensor:
        scores = OPS.matmul(x, *XQ, x.transpose(-1, -2), *XQ, 0.5, *OUT)
        shares = OPS.softmax_i_vit(scores, 100, -16, 15, 8, None)
        sums = OPS.matmul_accumulate(shares, 0, x, 7)
        y = OPS.rescale(sums, 0, MULTIPLIER[:1], SHIFT[:1], -1, *GRID)
        y = OPS.add_rescaled(y, 100, 2**30, 31, x, 7, 2**30, 31, *GRID)
        y = OPS.layer_norm_integer(y, 100, None, 1)
        return OPS.rescale(y, 0, MULTIPLIER[:1], SHIFT[:1], -1, *GRID)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    x = mode.from_tensor(X, static_shapes=False)
    with mode:
        result = forward(x)
    assert result.dtype == torch.uint8
    assert not isinstance(result.shape[0], int), "the batch size must stay symbolic"
