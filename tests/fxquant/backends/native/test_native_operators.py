"""Each operator on C++ kernels of our own, by itself, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.backends.native.lower import lower_to_native
from fxquant.integer import (
    dyadic,
    exp_table,
    log_softmax_constants,
    shift_gelu_constants,
    shiftmax_constants,
)
from fxquant.to_integer import Grid
from passes.infra.verify import flatten, run_and_annotate
from tests.fxquant.backends.integer_graphs import OPS

pytestmark = pytest.mark.usefixtures("native")
BYTE = Grid(0.03, 117, 0, 255, torch.uint8)
WIDE = Grid(0.0004, 0, -32768, 32767, torch.int16)
GENERATOR = torch.Generator().manual_seed(0)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR).to(dtype)


def check(
    function: Any, *arguments: Any, shape: tuple[int, ...] = (4, 6, 5, 5), grid: Grid = BYTE
) -> None:
    """`function` of codes of a float input of that shape, as batches of 4, 1 and 9 samples.

    "x" among the arguments stands for the codes, a second "y" for codes of it times -0.7.
    """
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    negated = graph.call_function(torch.mul, (x, -0.7)) if "y" in arguments else None

    def codes(source: Any) -> fx.Node:
        made = graph.call_function(OPS.quantize.default, (source, *grid.output()))
        made.meta["grid"] = grid
        return made

    values: dict[str, Any] = {"x": codes(x)}
    if negated is not None:
        values["y"] = codes(negated)
    found = []
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            root.register_buffer(f"constant_{index}", argument)
            found.append(graph.get_attr(f"constant_{index}"))
        else:
            found.append(values.get(argument, argument) if isinstance(argument, str) else argument)
    result = graph.call_function(function, tuple(found))
    result.meta["grid"] = grid
    graph.output((result,))
    module = fx.GraphModule(root, graph)
    sample = torch.randn(shape, generator=GENERATOR) * 2
    run_and_annotate(module, (sample,), name="graph")
    lowered, called = lower_to_native(module, (sample,), frozenset())
    assert set(called) <= {"mul"}, "it was not lowered"
    for batch in (sample, sample[:1], torch.cat([sample, sample.flip(1), sample[:1]])):
        expected, got = module(batch), lowered(batch)
        for (_, want), (_, result_) in zip(flatten(expected), flatten(got), strict=True):
            assert want.dtype == result_.dtype
            assert torch.equal(want, result_)
            assert len(want.unique()) > 1, "the example says nothing"


@pytest.mark.parametrize("grid", [BYTE, WIDE])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kernel", [1, 3])
def test_conv(grid: Grid, groups: int, kernel: int) -> None:
    weight = integers(-127, 128, 12, 6 // groups, kernel, kernel, dtype=torch.int8)
    scale = torch.rand(12, generator=GENERATOR) * 0.001 + 0.001
    bias = integers(-900, 900, 12, dtype=torch.int32)
    geometry = ([2, 1], [kernel // 2] * 2, [1, 1], groups)
    check(
        OPS.conv.default, "x", *grid.input, weight, scale, None, bias, *geometry, *grid.output(),
        grid=grid,
    )  # fmt: skip
    check(
        OPS.conv_accumulate.default, "x", grid.zero_point, weight, None, bias, *geometry, grid=grid
    )


def test_conv_transpose() -> None:
    weight = integers(-127, 128, 6, 4, 3, 3, dtype=torch.int8)
    scale = torch.full((8,), 0.002)
    geometry = ([2, 2], [1, 1], [1, 1], 2, [1, 1])
    check(
        OPS.conv_transpose.default, "x", *BYTE.input, weight, scale, None, None, *geometry,
        *BYTE.output(),
    )  # fmt: skip


@pytest.mark.parametrize("grid", [BYTE, WIDE])
def test_linear(grid: Grid) -> None:
    weight = integers(-127, 128, 70, 13, dtype=torch.int8)
    scale = torch.full((1,), 0.003)
    shape = (4, 3, 13)
    check(
        OPS.linear.default, "x", *grid.input, weight, scale, None, None, *grid.output(),
        shape=shape, grid=grid,
    )  # fmt: skip
    check(
        OPS.linear_accumulate.default, "x", grid.zero_point, weight, None, None, shape=shape,
        grid=grid,
    )  # fmt: skip


@pytest.mark.parametrize("grid", [BYTE, WIDE])
def test_pairs(grid: Grid) -> None:
    both = ("x", *grid.input, "y", *grid.input)
    check(OPS.add.default, *both, *grid.output(), grid=grid)
    check(OPS.mul.default, *both, *grid.output(), grid=grid)
    zero = grid.zero_point
    check(OPS.mul_accumulate.default, "x", zero, "y", zero, grid=grid)
    left, right = dyadic(0.37), dyadic(0.81)
    codes = (zero, grid.qmin, grid.qmax, grid.dtype)
    check(OPS.add_rescaled.default, "x", zero, *left, "y", zero, *right, *codes, grid=grid)


def test_channel_affine_and_lookup() -> None:
    weight, bias = torch.randn(6, generator=GENERATOR), torch.randn(6, generator=GENERATOR)
    check(OPS.channel_affine.default, "x", *BYTE.input, weight, bias, *BYTE.output())
    check(OPS.lookup.default, "x", integers(0, 256, 256, dtype=torch.uint8))


@pytest.mark.parametrize("grid", [BYTE, WIDE])
def test_pooling(grid: Grid) -> None:
    window = ([3, 2], [2, 1], [1, 0])
    check(OPS.max_pool.default, "x", *window, [1, 2], True, grid=grid)
    for include, divisor in ((True, None), (False, None), (True, 5)):
        check(
            OPS.avg_pool.default, "x", *grid.input, *window, True, include, divisor,
            *grid.output(), grid=grid,
        )  # fmt: skip
    check(OPS.adaptive_avg_pool.default, "x", *grid.input, [3, 2], *grid.output(), grid=grid)
    for dims, keep in (([2, 3], True), ([1], False), ([-1, 1], False)):
        check(OPS.mean.default, "x", *grid.input, dims, keep, *grid.output(), grid=grid)
        check(OPS.sum_accumulate.default, "x", grid.zero_point, dims, keep, grid=grid)


@pytest.mark.parametrize("grid", [BYTE, WIDE])
def test_products_of_activations(grid: Grid) -> None:
    both = ("x", *grid.input, "y", *grid.input)
    coarse = Grid(0.3, 100, 0, 255, torch.uint8) if grid is BYTE else grid
    check(OPS.matmul.default, *both, 0.5, *coarse.output(), grid=grid)
    check(OPS.matmul.default, *both, 0.5, 1.0, 0, 0, 0, torch.float32, grid=grid)
    check(
        OPS.weighted_mean.default, "x", grid.zero_point, "y", *grid.input, *coarse.output(),
        grid=grid,
    )  # fmt: skip
    check(OPS.matmul_accumulate.default, "x", grid.zero_point, "y", grid.zero_point, grid=grid)


def test_rescale() -> None:
    multiplier, shift = integers(2**29, 2**31, 6), integers(29, 33, 6)
    check(OPS.rescale.default, "x", BYTE.zero_point, multiplier, shift, 1, 7, -128, 127, torch.int8)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True] * 6 + [False]] * 5)])
@pytest.mark.parametrize("grid", [BYTE, WIDE])
def test_softmax_on_integers(mask: Tensor | None, grid: Grid) -> None:
    shape = (4, 2, 5, 7)
    if grid is BYTE:
        table = ("x", exp_table(grid.scale), 256, 0, 255, torch.uint8, mask)
        check(OPS.softmax_table.default, *table, shape=shape)
    constants = shiftmax_constants(grid.scale, 7)
    for bits in (8, 16):
        check(
            OPS.softmax_i_vit.default, "x", grid.zero_point, *constants, bits, mask, shape=shape,
            grid=grid,
        )  # fmt: skip
    x0, b, c, n = log_softmax_constants(grid.scale, 7)
    check(
        OPS.softmax_log2.default, "x", grid.zero_point, x0, b, c, n, 4, mask, shape=shape,
        grid=grid,
    )  # fmt: skip


@pytest.mark.parametrize("grid", [BYTE, WIDE])
def test_gelu_and_norms_on_integers(grid: Grid) -> None:
    shape, zero = (4, 3, 5, 8), grid.zero_point
    check(
        OPS.gelu_i_vit.default, "x", zero, *shift_gelu_constants(grid.scale), 8, shape=shape,
        grid=grid,
    )  # fmt: skip
    for dims, normalized in ((1, (8,)), (2, (5, 8))):
        bias = integers(-9000, 9000, *normalized)
        for function in (OPS.layer_norm_i_vit.default, OPS.layer_norm_integer.default):
            check(function, "x", zero, bias, dims, shape=shape, grid=grid)
        shifts = integers(0, 4, 8)
        check(
            OPS.layer_norm_power_of_two.default, "x", zero, shifts, bias, dims, shape=shape,
            grid=grid,
        )  # fmt: skip
    for dim in (1, -1):
        check(OPS.normalize_integer.default, "x", zero, dim, shape=shape, grid=grid)


@pytest.mark.parametrize("grid", [BYTE, WIDE])
def test_movement(grid: Grid) -> None:
    check(torch.permute, "x", (0, 2, 3, 1), grid=grid)
    check(torch.reshape, "x", (-1, 25, 6), grid=grid)
    check(torch.flatten, "x", 1, grid=grid)
    check(torch.roll, "x", (1, -2), (2, 3), grid=grid)
    check(torch.channel_shuffle, "x", 3, grid=grid)
