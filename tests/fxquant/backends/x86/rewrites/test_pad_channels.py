from __future__ import annotations

from fxquant.backends.x86.rewrites import PadChannels
from passes import tensor_info
from tests.fxquant.backends.integer_graphs import (
    AFFINE,
    CHANNELS,
    ONE_SIDED,
    OPS,
    IntegerGraph,
    rewritten,
)


def test_pads_a_pooled_convolution_and_its_readers() -> None:
    graph = IntegerGraph(0)
    pooled = graph.max_pool(graph.conv(graph.x, ONE_SIDED, CHANNELS, 5, relu=True))
    a = graph.conv(pooled, AFFINE, 5, 4)
    b = graph.conv(graph.depthwise(pooled, AFFINE, 5), ONE_SIDED, 5, 4, per_tensor=True)
    after, _ = rewritten(PadChannels(), graph, a, b)
    shapes = [
        info.shape[1] for n in after.graph.nodes if (info := tensor_info(n)) and "grid" in n.meta
    ]
    assert shapes == [CHANNELS, 32, 32, 4, 32, 4]


def test_pads_averages_to_sixteen_channels() -> None:
    graph = IntegerGraph(0)
    y = graph.conv(graph.x, ONE_SIDED, CHANNELS, 5, bias=False)
    window = ([2, 2], [2, 2], [0, 0], False, True, None)
    y = graph.call(
        OPS.avg_pool.default, ONE_SIDED, y, *ONE_SIDED.input, *window, *ONE_SIDED.output()
    )
    after, _ = rewritten(PadChannels(), graph, graph.conv(y, AFFINE, 5, 4))
    pool = next(n for n in after.graph.nodes if n.target is OPS.avg_pool.default)
    info = tensor_info(pool)
    assert info is not None
    assert info.shape[1] == 16


def test_leaves_whole_vectors_alone() -> None:
    graph = IntegerGraph(0)
    y = graph.max_pool(graph.conv(graph.x, ONE_SIDED, CHANNELS, 64))
    _, result = rewritten(PadChannels(), graph, graph.conv(y, AFFINE, 64, 4), modified=False)
    assert result.declines == ()


def test_declines_where_a_shuffle_reads_the_channels() -> None:
    graph = IntegerGraph(0)
    y = graph.shuffle(graph.max_pool(graph.conv(graph.x, ONE_SIDED, CHANNELS, 6)))
    _, result = rewritten(PadChannels(), graph, graph.conv(y, AFFINE, 6, 4), modified=False)
    assert "is no convolution" in result.declines[0].reason


def test_declines_where_the_pool_is_an_output() -> None:
    graph = IntegerGraph(0)
    y = graph.max_pool(graph.conv(graph.x, ONE_SIDED, CHANNELS, 6))
    _, result = rewritten(PadChannels(), graph, y, modified=False)
    assert result.declines[0].reason == "output reads the channels, and is no convolution"
