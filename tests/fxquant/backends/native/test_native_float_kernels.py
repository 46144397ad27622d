"""Float islands: exponential and error function within 2 ulp, a code at most one step away."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant import integer
from fxquant.backends.native.packing import pack_conv, pad_outputs
from fxquant.integer.rounding import channel_factors, float32_scalar
from tests.fxquant.backends.native.kernels import call, compiler, instruction_sets, library

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
each_isa = pytest.mark.parametrize("isa", instruction_sets())


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _ulps(found: Tensor, exact: Tensor) -> Tensor:
    """The distance in steps of a float32 at the exact value (float64)."""
    nearest = exact.float().abs().clamp(min=2.0**-126)
    step = torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest
    return (found.double() - exact).abs() / step.double()


@pytest.mark.skipif("avx512vnni" not in instruction_sets(), reason="needs AVX-512")
@pytest.mark.parametrize(
    ("name", "exact", "low", "high"),
    [("exp_of", torch.exp, -87.0, 88.0), ("erf_of", torch.erf, -6.0, 6.0)],
)
def test_is_within_two_ulp(name: str, exact: object, low: float, high: float) -> None:
    x = torch.cat([torch.linspace(low, high, 2**21), torch.linspace(-1, 1, 2**21)])
    y = torch.empty_like(x)
    function = getattr(library(), f"avx512vnni_{name}")
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), x.numel())
    assert _ulps(y, exact(x.double())).max() <= 2  # type: ignore[operator]


@each_isa
def test_rows_of_floats(isa: str) -> None:
    x, weight, bias = torch.randn(5, 77) * 3, torch.randn(77), torch.randn(77)
    size = {"rows": 5, "columns": 77, "x_row": 77, "y_row": 77}
    y = torch.zeros(5, 77)
    call(isa, "softmax_float", x=x, y=y, **size)
    # 77 exponentials of 2 ulp and their sum.
    assert torch.allclose(y, x.double().softmax(-1).float(), rtol=2**-18, atol=0)
    call(isa, "gelu_float", x=x, y=y, **size)
    assert torch.allclose(y, F.gelu(x.double()).float(), rtol=2**-20, atol=2**-22)
    codes, scale = torch.zeros(5, 77, dtype=torch.uint8), 0.03
    call(
        isa,
        "layer_norm_float",
        x=x,
        y=y,
        weight=weight,
        bias=bias,
        codes=codes,
        codes_row=77,
        **size,
        epsilon=1e-6,
        inverse=float(float32_scalar(1.0) / float32_scalar(scale)),
        zero_point=100,
        hi=255,
    )
    expected = F.layer_norm(x.double(), (77,), weight.double(), bias.double(), 1e-6)
    assert torch.allclose(y, expected.float(), rtol=0, atol=2**-18)
    wanted = integer.quantize(expected.float(), scale, 100, 0, 255, torch.uint8)
    assert (codes.int() - wanted.int()).abs().max() <= 1
    call(isa, "add_float", a=x, b=expected.float(), y=y, a_row=77, b_row=77, y_row=77,
         rows=5, columns=77)  # fmt: skip
    assert torch.equal(y, x + expected.float())


@each_isa
def test_gelu_is_as_near_as_an_error_function_of_two_ulp(isa: str) -> None:
    x = torch.linspace(-9, 9, 2**18)
    y = torch.empty_like(x)
    call(isa, "gelu_float", x=x, y=y, rows=1, columns=x.numel())
    assert ((y - F.gelu(x.double())).abs() <= 2**-23 * x.abs() + 2**-126).all()


@each_isa
def test_a_linear_layer_ends_in_gelu(isa: str) -> None:
    x, weight = _codes(9, 48), torch.randint(-127, 128, (100, 48), dtype=torch.int8)
    scales, scale = torch.rand(100) * 0.01, 0.04
    real = integer.linear(x, 0.02, 121, weight, scales, None, None, 1.0, 0, 0, 0, torch.float32)
    wanted = integer.quantize(F.gelu(real), scale, 10, 0, 255, torch.uint8)
    y = torch.zeros(9, 100, dtype=torch.uint8)
    call(
        isa,
        "conv",
        x=x,
        segment_offset=torch.zeros(1, dtype=torch.int32),
        weight=pack_conv(weight[:, :, None, None]),
        bias=pad_outputs(-121 * weight.sum(1, dtype=torch.int32)),
        multiplier=pad_outputs(channel_factors(0.02, scales, None)),
        y=y,
        x_column=48,
        y_pixel=100,
        batch=1,
        height=1,
        width=9,
        groups=1,
        outputs=100,
        segments=1,
        segment_quads=12,
        kind=3,
        inverse=float(float32_scalar(1.0) / float32_scalar(scale)),
        zero_point=10,
        hi=255,
    )
    assert (y.int() - wanted.int()).abs().max() <= 1
    assert (y != wanted).float().mean() < 0.01


@each_isa
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "width"),
    [(7, 7, 8, 8), (50, 50, 64, 64), (13, 197, 30, 70), (21, 197, 40, 70)],
)
def test_attention_is_scores_numerators_and_a_weighted_mean(
    isa: str, rows: int, columns: int, depth: int, width: int
) -> None:
    heads = 3
    q, k = _codes(2, rows, heads, depth), _codes(2, columns, heads, depth)
    v = _codes(2, columns, heads, width)
    score = 0.02 * 0.03 * 0.125
    scores = integer.matmul(
        q.transpose(1, 2), 0.02, 129, k.permute(0, 2, 3, 1), 0.03, 123, 0.125,
        1.0, 0, 0, 0, torch.float32,
    )  # fmt: skip
    numerators = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = integer.quantize(numerators, 1 / 255, 0, 0, 255, torch.uint8)
    wanted = integer.weighted_mean(
        weights, 0, v.transpose(1, 2), 0.02, 127, 0.001, 124, 0, 255, torch.uint8
    ).transpose(1, 2)
    y = torch.zeros_like(wanted).contiguous()
    strides = {}
    for name, value in (("q", q), ("k", k), ("v", v), ("y", y)):
        batch, row, head, _ = value.stride()
        strides |= {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}
    call(
        isa,
        "attention",
        2,
        q=q,
        k=k,
        v=v,
        y=y,
        **strides,
        batch=2,
        heads=heads,
        rows=rows,
        columns=columns,
        depth=depth,
        width=width,
        q_zero_point=129,
        k_zero_point=123,
        v_zero_point=127,
        zero_point=124,
        hi=255,
        score_multiplier=float(float32_scalar(score)),
        inverse=float(float32_scalar(1.0) / float32_scalar(1 / 255)),
        multiplier=float(float32_scalar(0.02 / 0.001)),
    )
    assert (y.int() - wanted.int()).abs().max() <= 1
    assert (y != wanted).float().mean() < 0.02
