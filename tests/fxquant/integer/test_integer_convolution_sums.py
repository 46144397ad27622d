from __future__ import annotations

from typing import Any

import pytest
import torch

from fxquant import integer
from fxquant.integer import accumulators, convolution_sums
from tests.fxquant.integer import plain

FLOAT: dict[str, Any] = {
    "scale": 1.0, "zero_point": 0, "qmin": 0, "qmax": 0, "dtype": torch.float32,
}  # fmt: skip
CODES: dict[str, Any] = {
    "scale": 0.3, "zero_point": 99, "qmin": 0, "qmax": 255, "dtype": torch.uint8,
}  # fmt: skip


def geometry(spatial: int, padding: int = 0, groups: int = 1) -> dict[str, Any]:
    ones = [1] * spatial
    return {"stride": ones, "padding": [padding] * spatial, "dilation": ones, "groups": groups}


def sums_of(x: torch.Tensor, weight: torch.Tensor, geo: dict[str, Any], **changes: Any) -> Any:
    """The exact sums as float32, and the plain ones."""
    bias = changes.get("bias")
    found = integer.conv(x, 1.0, 7, weight, torch.ones(1), None, bias, **geo, **FLOAT)
    return found, plain.conv_sums(x, 7, weight, None, bias, **geo)


@pytest.mark.parametrize("float32", [True, False])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 2), (3, 4)])
def test_every_way_gives_the_same_sums(
    float32: bool, spatial: int, kernel: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution_sums, "_HAS_PLAIN_FLOAT32", float32)
    x = plain.uint8([2, 4, *[4] * spatial])
    weight = plain.int8([4, 4 // groups, *[kernel] * spatial])
    bias = torch.randint(-999, 999, (4,), dtype=torch.int32)
    for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        geo = geometry(spatial, kernel // 2, groups)
        assert plain.same(*sums_of(layout, weight, geo, bias=bias))


@pytest.mark.parametrize("kernel", [1, 3])
def test_float32_is_exact_up_to_the_last_integer_that_it_holds(kernel: int) -> None:
    # 255 · 127 · 518 + 255 · 5 = 2^24 − 511, and one code less makes it odd.
    weight = torch.full((1, 519, 1, 1), 127, dtype=torch.int8)
    weight[0, 518] = 5
    if kernel == 3:
        weight = torch.nn.functional.pad(weight, (1, 1, 1, 1))
    for code in (255, 254):
        x = torch.full((1, 519, 2, 2), 255, dtype=torch.uint8)
        x[0, 0] = code
        geo = geometry(2, kernel // 2)
        args = (x, 1.0, 0, weight, torch.ones(1), None, None)
        expected = 2**24 - 511 - 127 * (255 - code)
        assert integer.conv(*args, **geo, **FLOAT).unique().tolist() == [expected]


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 64)])
def test_exact_under_reduced_convolution_precision(kernel: int, groups: int) -> None:
    x = plain.uint8([2, 64, 9, 9]).contiguous(memory_format=torch.channels_last)
    weight = plain.int8([64, 64 // groups, kernel, kernel])
    geo, bias = geometry(2, kernel // 2, groups), torch.randint(-(2**20), 2**20, (64,)).int()
    settings: Any = torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        found = integer.conv(x, 1.0, 7, weight, torch.ones(1), None, bias, **geo, **FLOAT)
    finally:
        settings.fp32_precision = before
    real = torch.nn.functional.conv2d(
        x.double() - 7, weight.double(), bias.double(), 1, kernel // 2, 1, groups
    )
    assert torch.equal(found.double(), real)


def test_a_bias_beyond_float32_is_rounded_with_the_sum() -> None:
    # The bias alone would be rounded to 2^24 in float32, and the sum to 2^24 − 1.
    x = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    weight = torch.full((1, 1, 1, 1), -1, dtype=torch.int8)
    bias = torch.tensor([2**24 + 3], dtype=torch.int32)
    for groups, kernel in ((1, weight), (2, weight.expand(2, 1, 1, 1))):
        codes, summand = x.expand(1, groups, 2, 2), bias.expand(groups)
        found = integer.conv(
            codes + 1, 1.0, 0, kernel, torch.ones(1), None, summand, **geometry(2, 0, groups),
            **FLOAT,
        )  # fmt: skip
        assert found.unique().tolist() == [2**24 + 2]


def test_a_bias_that_int32_does_not_hold_on_top_of_the_sums() -> None:
    x = torch.full((1, 2, 9), 32767, dtype=torch.int16)
    weight = torch.full((2, 1, 9), 127, dtype=torch.int8)
    bias = torch.full((2,), 2**31 - 1, dtype=torch.int32)
    geo = geometry(1, 0, 2)
    found = integer.conv(x, 1.0, 0, weight, torch.ones(1), None, bias, **geo, **FLOAT)
    expected = torch.tensor(9 * 127 * 32767 + 2**31 - 1, dtype=torch.float64).float()
    assert torch.equal(found.flatten(), expected.expand(2))


@pytest.mark.parametrize("groups", [1, 4])
def test_chunks_give_the_same_codes(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = plain.uint8([5, 4, 6, 6]), plain.int8([4, 4 // groups, 3, 3])
    residual, scale = plain.uint8([5, 4, 6, 6]), plain.scales(4)
    last = x.contiguous(memory_format=torch.channels_last)

    def run(codes: torch.Tensor) -> torch.Tensor:
        return integer.conv(
            codes, 0.02, 8, weight, scale, None, None, **geometry(2, 1, groups), **CODES,
            residual=residual, residual_scale=0.2, residual_zero_point=3,
        )  # fmt: skip

    whole = run(x)
    for elements in (1, 2 * x[0].numel(), 3 * x[0].numel()):
        monkeypatch.setattr(accumulators, "_ELEMENTS_AT_ONCE", elements)
        assert torch.equal(run(x), whole)
        assert torch.equal(run(last), whole)
        assert run(last).is_contiguous(memory_format=torch.channels_last)


def test_rows_of_a_linear_layer_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, residual = plain.uint8([3, 5, 7]), plain.int8([4, 7]), plain.uint8([3, 5, 4])
    args = (x, 0.02, 8, weight, plain.scales(4), None, None)
    extra = {"residual": residual, "residual_scale": 0.2, "residual_zero_point": 3}
    whole = integer.linear(*args, **CODES, **extra)
    monkeypatch.setattr(accumulators, "_ELEMENTS_AT_ONCE", 14)
    assert torch.equal(integer.linear(*args, **CODES, **extra), whole)
