"""Pieces of transformers on x86: which kernels they call, and that they give the same integers."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxquant.backends.x86.executor import Executor
from fxquant.backends.x86.target import X86
from fxquant.to_integer import Grid
from tests.fxquant.backends.integer_graphs import ONE_SIDED
from tests.fxquant.backends.token_graphs import PROBABILITIES, TOKENS, TokenGraph, kernels, lowered

RAW = "qlinear_pointwise.default"
# More products than that, and the raw operator pays.
WIDE = 2304


def raw_linear_graph(seed: int = 0) -> TokenGraph:
    return TokenGraph(seed, 16, 128)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("grid", [TOKENS, ONE_SIDED])
def test_layers_with_many_products_take_the_raw_kernel(
    grid: Grid, per_tensor: bool, bias: bool
) -> None:
    graph = raw_linear_graph()
    y = graph.linear(graph.x, grid, 128, WIDE, per_tensor=per_tensor, bias=bias)
    _, x86 = lowered(graph, y)
    assert kernels(x86)[RAW] == 1


def test_layers_with_few_products_take_fbgemm() -> None:
    graph = TokenGraph(0, 1, 16)
    _, x86 = lowered(graph, graph.linear(graph.x, TOKENS, 16, 24))
    assert kernels(x86)["linear.default"] == 1


def test_weights_with_zero_points_take_fbgemm() -> None:
    graph = raw_linear_graph()
    _, x86 = lowered(graph, graph.linear(graph.x, TOKENS, 128, WIDE, zero_points=True))
    assert kernels(x86)["linear.default"] == 1


@pytest.mark.parametrize(("low", "high"), [(TOKENS.zero_point, None), (100, 200), (None, 180)])
def test_bounds_of_the_raw_kernel(low: int | None, high: int | None) -> None:
    graph = raw_linear_graph()
    y = graph.linear(graph.x, TOKENS, 128, WIDE, low=low, high=high)
    _, x86 = lowered(graph, y)
    of_the_input = 1
    assert kernels(x86)["clamp"] - of_the_input == int((low, high) != (TOKENS.zero_point, None))


def test_movement_of_plain_codes_copies_nothing() -> None:
    graph = raw_linear_graph()
    y = graph.linear(graph.x, TOKENS, 128, WIDE)
    y = graph.call(torch.reshape, TOKENS, y, shape=(2, 16, 3, 768))
    y = graph.call(torch.permute, TOKENS, y, dims=(0, 2, 1, 3))
    parts = graph.call(torch.chunk, TOKENS, y, chunks=3, dim=1)
    y = graph.call(torch.cat, TOKENS, [graph.call(*_item(parts, i)) for i in (2, 0)], dim=1)
    y = graph.call(torch.reshape, TOKENS, y, shape=(2, 32, 768))
    _, x86 = lowered(graph, graph.linear(y, TOKENS, 768, 512))
    names = kernels(x86)
    assert names[RAW] == 2
    assert not {"int_repr", "clone", "as_quantized", "linear.default"} & set(names)
    assert names["codes"] == 1


def _item(parts: Any, index: int) -> tuple[Any, ...]:
    return operator.getitem, TOKENS, parts, index


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (F.gelu, {"approximate": "none"}),
        (F.gelu, {"approximate": "tanh"}),
        (F.relu, {"inplace": False}),
        (F.silu, {"inplace": False}),
    ],
)
@pytest.mark.parametrize("low", [None, 60])
def test_an_activation_between_floats_is_applied_by_the_layer(
    function: Any, options: dict[str, Any], low: int | None
) -> None:
    graph = raw_linear_graph()
    y = graph.function(function, graph.linear(graph.x, None, 128, 192), **options)
    _, x86 = lowered(graph, graph.quantize(y, TOKENS, low))
    names = kernels(x86)
    assert names[RAW] == 1
    assert not {"gelu", "relu", "silu"} & set(names)


@pytest.mark.parametrize("reader", ["of the layer", "of the activation"])
def test_an_activation_stays_where_its_floats_are_read_again(reader: str) -> None:
    graph = raw_linear_graph()
    y = graph.linear(graph.x, None, 128, 192)
    activated = graph.function(F.gelu, y, approximate="none")
    other = y if reader == "of the layer" else activated
    _, x86 = lowered(graph, graph.quantize(activated, TOKENS), graph.function(torch.neg, other))
    assert kernels(x86)["gelu"] == 1


@pytest.mark.parametrize("shape", [(5, 8), (4, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("grid", [TOKENS, None])
def test_products_of_activations(shape: tuple[int, ...], grid: Grid | None) -> None:
    *batch, rows, depth = shape
    graph = TokenGraph(0, rows * depth, 1)
    graph.example = torch.randn(*batch, rows, depth)
    b = graph.call(torch.transpose, TOKENS, graph.x, dim0=-2, dim1=-1)
    y = graph.matmul(graph.x, b, grid, 0.3)
    end = y if grid is not None else graph.quantize(y, Grid(0.05, 9, 0, 255, torch.uint8))
    _, x86 = lowered(graph, end)
    assert kernels(x86)["product"] == 1


def test_products_broadcast() -> None:
    graph = TokenGraph(0, 6, 8)
    b = graph.call(torch.transpose, TOKENS, graph.x, dim0=-2, dim1=-1)
    a = graph.call(torch.unsqueeze, TOKENS, graph.x, dim=0)
    a = graph.call(torch.unsqueeze, TOKENS, a, dim=2)
    _, x86 = lowered(graph, graph.matmul(a, b, TOKENS, 0.3))
    assert kernels(x86)["product"] == 1


@pytest.mark.parametrize("depth", [400, 260])
def test_sums_that_float32_cannot_hold_take_the_reference(depth: int) -> None:
    graph = TokenGraph(0, 4, depth, Grid(0.03, 0, 0, 255, torch.uint8))
    graph.example = graph.example[:1] + 9
    b = graph.call(torch.transpose, graph.x.meta["grid"], graph.x, dim0=-2, dim1=-1)
    _, x86 = lowered(graph, graph.matmul(graph.x, b, Grid(300.0, 0, 0, 255, torch.uint8)))
    assert kernels(x86)["matmul.default"] == 1


def test_probabilities_are_exact_in_rows_of_any_length() -> None:
    graph = TokenGraph(0, 400, 8)
    graph.example = graph.example[:1]
    k = graph.call(torch.transpose, TOKENS, graph.x, dim0=-2, dim1=-1)
    scores = graph.function(F.softmax, graph.matmul(graph.x, k, None, 4.0), dim=-1)
    y = graph.matmul(graph.quantize(scores, PROBABILITIES), graph.x, TOKENS, 1.5)
    _, x86 = lowered(graph, y)
    assert kernels(x86)["product"] == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_transformer_block(seed: int) -> None:
    graph = TokenGraph(seed, 20, 48)
    y = graph.block(graph.dequantize(graph.x), 4, 192)
    integer, x86 = lowered(graph, graph.block(y, 4, 192))
    names = kernels(x86)
    assert not {"gelu", "int_repr", "clone"} & set(names)
    assert not any(n.meta.get("kernel") == "reference" for n in x86.graph.nodes)
    with torch.no_grad():
        for batch in (graph.example[:1], torch.cat([graph.example, -graph.example])):
            assert torch.allclose(integer(batch)[0], x86(batch)[0], atol=0.3)


def test_a_quantizer_that_is_kept_runs_the_reference() -> None:
    graph = raw_linear_graph()
    y = graph.linear(graph.x, None, 128, 192)
    y = graph.quantize(graph.function(F.gelu, y, approximate="none"), TOKENS)
    x86 = X86().lower(graph.finish(y), (graph.example,), frozenset({y.name})).graph_module
    assert kernels(x86)["quantize.default"] == 1


def test_a_transformer_runs_as_one_traced_stretch() -> None:
    graph = TokenGraph(0, 20, 48)
    y = graph.block(graph.dequantize(graph.x), 4, 192)
    _, x86 = lowered(graph, y)
    run = Executor(x86, (graph.example,))
    for batch in (graph.example, graph.example[:1], torch.cat([graph.example] * 3)):
        with torch.no_grad():
            assert torch.equal(run(batch)[0], x86(batch)[0])
    assert run._traced is not None
    assert kernels(run._traced) == {"stretch_0": 1, "getitem": 1}
