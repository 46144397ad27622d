from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import fx

from fxquant.backends.x86.rewrites import MergeBranches
from fxquant.to_integer import Grid
from tests.fxquant.backends.integer_graphs import (
    AFFINE,
    CHANNELS,
    ONE_SIDED,
    IntegerGraph,
    operations,
    rewritten,
)

HALF = CHANNELS // 2
NARROW = replace(ONE_SIDED, scale=0.013)
MERGE = MergeBranches(1000, 10**9)


def unit(
    graph: IntegerGraph,
    x: fx.Node,
    first: Grid = NARROW,
    second: Grid = AFFINE,
    *,
    per_tensor: bool = False,
) -> fx.Node:
    """ShuffleNetV2's unit of stride 1."""
    passed, branch = graph.halves(x)
    y = graph.conv(branch, first, HALF, HALF, relu=True, per_tensor=per_tensor)
    y = graph.depthwise(y, second, HALF)
    y = graph.conv(y, x.meta["grid"], HALF, HALF, relu=True, per_tensor=per_tensor)
    return graph.shuffle(graph.cat(passed, y))


@pytest.mark.parametrize("seed", range(6))
def test_merges_a_unit_of_stride_1(seed: int) -> None:
    graph = IntegerGraph(seed)
    after, _ = rewritten(MERGE, graph, unit(graph, graph.x))
    assert operations(after) == {"quantize": 1, "conv": 3}


def test_merges_units_in_a_row() -> None:
    graph = IntegerGraph(0)
    after, _ = rewritten(MERGE, graph, unit(graph, unit(graph, unit(graph, graph.x))))
    assert operations(after) == {"quantize": 1, "conv": 9}


@pytest.mark.parametrize("seed", range(20))
def test_merges_with_any_scales_and_zero_points(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def grid(zero_point: int) -> Grid:
        scale = float(torch.rand((), generator=generator, dtype=torch.float64)) * 0.05 + 0.001
        return Grid(scale, zero_point, 0, 255, torch.uint8)

    source, first, second = (
        grid(int(torch.randint(0, high, (), generator=generator))) for high in (60, 20, 256)
    )
    source = replace(source, zero_point=max(source.zero_point, first.zero_point))
    graph = IntegerGraph(seed, source)
    after, _ = rewritten(MERGE, graph, unit(graph, graph.x, first, second))
    assert operations(after)["conv"] == 3


def test_merges_with_weight_scales_of_whole_tensors() -> None:
    graph = IntegerGraph(0)
    after, _ = rewritten(MERGE, graph, unit(graph, graph.x, per_tensor=True))
    assert operations(after)["conv"] == 3


def test_declines_where_a_clamp_would_cut_a_passed_value() -> None:
    graph = IntegerGraph(0)
    first = replace(ONE_SIDED, zero_point=40)
    _, result = rewritten(MERGE, graph, unit(graph, graph.x, first), modified=False)
    assert result.declines[0].reason == ("a layer's clamp is too narrow for a value that passes by")


def test_a_narrow_clamp_before_the_unit_makes_room() -> None:
    graph = IntegerGraph(0, replace(ONE_SIDED, zero_point=40))
    first = replace(ONE_SIDED, zero_point=40)
    rewritten(MERGE, graph, unit(graph, graph.x, first))


def downsampling(graph: IntegerGraph, x: fx.Node, left: Grid, right: Grid) -> fx.Node:
    """ShuffleNetV2's unit of stride 2: both branches read all channels."""
    end = replace(ONE_SIDED, scale=0.017)
    a = graph.depthwise(x, left, CHANNELS, stride=2)
    a = graph.conv(a, end, CHANNELS, 4, relu=True)
    b = graph.conv(x, NARROW, CHANNELS, 5, relu=True)
    b = graph.depthwise(b, right, 5, stride=2)
    b = graph.conv(b, end, 5, 4, relu=True)
    return graph.shuffle(graph.cat(a, b))


@pytest.mark.parametrize("seed", range(4))
def test_merges_branches_of_stride_2_with_one_zero_point(seed: int) -> None:
    graph = IntegerGraph(seed)
    left = replace(AFFINE, scale=0.0411)
    after, _ = rewritten(MERGE, graph, downsampling(graph, graph.x, left, AFFINE))
    assert operations(after) == {"quantize": 1, "conv": 3}


def test_declines_branches_with_different_zero_points() -> None:
    graph = IntegerGraph(0)
    left = replace(AFFINE, zero_point=100)
    y = downsampling(graph, graph.x, left, AFFINE)
    _, result = rewritten(MERGE, graph, y, modified=False)
    assert result.declines[0].reason == "has branches with different zero points"


def test_merges_two_chains_beside_a_whole_value() -> None:
    graph = IntegerGraph(0)
    end = graph.x.meta["grid"]

    def chain() -> fx.Node:
        y = graph.conv(graph.x, AFFINE, CHANNELS, 4)
        return graph.conv(graph.depthwise(y, AFFINE, 4), end, 4, 5)

    after, _ = rewritten(MERGE, graph, graph.cat(chain(), graph.x, chain()))
    assert operations(after)["conv"] == 3


def test_a_bias_takes_up_a_shift_before_a_layer_that_computes() -> None:
    graph = IntegerGraph(0, AFFINE)
    late = graph.conv(graph.x, ONE_SIDED, CHANNELS, 4)
    # Here the codes from 117 to 255 cannot keep their distance to the zero point.
    far = replace(AFFINE, zero_point=200)
    long = graph.conv(graph.conv(graph.x, far, CHANNELS, 4), ONE_SIDED, 4, 4)
    after, _ = rewritten(MERGE, graph, graph.cat(late, long))
    assert operations(after)["conv"] == 2


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_merged_keeps_its_integers(seed: int) -> None:
    draw = random.Random(seed)
    graph = IntegerGraph(seed, replace(ONE_SIDED, zero_point=draw.choice([0, 0, 30])))
    end: Grid = graph.x.meta["grid"]
    middles = [replace(AFFINE, zero_point=draw.choice([0, 0, 117])) for _ in range(2)]
    sources = [graph.x, *graph.halves(graph.x)]

    def branch() -> fx.Node:
        y = draw.choice(sources)
        inputs = CHANNELS if y is graph.x else HALF
        length = draw.choice([0, 2, 3])
        if length == 3:
            y, inputs = graph.conv(y, middles[0], inputs, 4, relu=draw.random() < 0.3), 4
        if length >= 2:
            y = graph.depthwise(y, replace(middles[1], scale=draw.choice([0.03, 0.05])), inputs)
            y = graph.conv(y, end, inputs, 5, per_tensor=draw.random() < 0.3)
        return y

    y = graph.cat(*(branch() for _ in range(draw.choice([2, 3]))))
    rewritten(MERGE, graph, y, modified=None)


def test_leaves_branches_of_different_values_apart() -> None:
    graph = IntegerGraph(0)
    other = graph.max_pool(graph.conv(graph.x, ONE_SIDED, CHANNELS, CHANNELS))
    other = graph.call(torch.nn.functional.interpolate, ONE_SIDED, other, size=(5, 5))
    y = graph.conv(graph.conv(other, AFFINE, CHANNELS, 4), ONE_SIDED, 4, 4)
    _, result = rewritten(MERGE, graph, graph.cat(graph.x, y), modified=False)
    assert result.declines[0].reason == "reads several values"


def test_leaves_a_value_that_is_read_elsewhere_alone() -> None:
    graph = IntegerGraph(0)
    y = graph.conv(graph.x, ONE_SIDED, CHANNELS, CHANNELS)
    z = graph.conv(graph.depthwise(y, ONE_SIDED, CHANNELS), ONE_SIDED, CHANNELS, CHANNELS)
    _, result = rewritten(MERGE, graph, graph.cat(graph.x, z), y, modified=False)
    assert result.declines[0].reason == "reads several values"


def test_declines_a_layer_with_a_residual() -> None:
    graph = IntegerGraph(0)
    y = graph.conv(graph.x, AFFINE, CHANNELS, CHANNELS)
    y = graph.conv(y, ONE_SIDED, CHANNELS, CHANNELS, residual=graph.x)
    _, result = rewritten(MERGE, graph, graph.cat(graph.x, y), modified=False)
    assert result.declines == ()


@pytest.mark.parametrize("merge", [MergeBranches(CHANNELS - 1, 10**9), MergeBranches(1000, 100)])
def test_declines_where_zeros_cost_more_than_calls(merge: MergeBranches) -> None:
    graph = IntegerGraph(0)
    _, result = rewritten(merge, graph, unit(graph, graph.x), modified=False)
    # Two layers from 3x3 to 6x6 weights and one from 3 to 6 windows of 9, at 25 positions.
    assert result.declines[0].reason == "6 channels would multiply 2025 zeros"
