from __future__ import annotations

from fxquant.backends.x86.rewrites import FoldChannelShuffle
from tests.fxquant.backends.integer_graphs import (
    AFFINE,
    CHANNELS,
    ONE_SIDED,
    IntegerGraph,
    operations,
    rewritten,
)


def test_folds_a_shuffle_into_all_readers() -> None:
    graph = IntegerGraph(0)
    shuffled = graph.shuffle(graph.x)
    a = graph.conv(shuffled, AFFINE, CHANNELS, 4, kernel=3)
    b = graph.conv(shuffled, ONE_SIDED, CHANNELS, 4)
    after, _ = rewritten(FoldChannelShuffle(), graph, a, b)
    assert operations(after) == {"quantize": 1, "conv": 2}


def test_folds_a_shuffle_of_three_groups() -> None:
    graph = IntegerGraph(0)
    y = graph.conv(graph.shuffle(graph.x, groups=3), AFFINE, CHANNELS, 4)
    rewritten(FoldChannelShuffle(), graph, y)


def test_keeps_the_residual_of_a_reader() -> None:
    graph = IntegerGraph(0)
    y = graph.conv(graph.shuffle(graph.x), AFFINE, CHANNELS, CHANNELS, residual=graph.x)
    rewritten(FoldChannelShuffle(), graph, y)


def test_declines_where_the_shuffled_value_is_a_residual() -> None:
    graph = IntegerGraph(0)
    shuffled = graph.shuffle(graph.x)
    y = graph.conv(shuffled, AFFINE, CHANNELS, CHANNELS, residual=shuffled)
    _, result = rewritten(FoldChannelShuffle(), graph, y, modified=False)
    assert "is no convolution of all channels" in result.declines[0].reason


def test_declines_where_a_convolution_has_groups() -> None:
    graph = IntegerGraph(0)
    y = graph.depthwise(graph.shuffle(graph.x), AFFINE, CHANNELS)
    _, result = rewritten(FoldChannelShuffle(), graph, y, modified=False)
    assert "is no convolution of all channels" in result.declines[0].reason
