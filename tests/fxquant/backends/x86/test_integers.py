"""Operators on integers alone on x86: the kernels that stand for them, and their integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxquant.integer import dyadic, dyadic_tensors, exp_table, layer_norm_bias, layer_norm_scale
from fxquant.to_integer import Grid
from tests.fxquant.backends.integer_graphs import OPS
from tests.fxquant.backends.token_graphs import PROBABILITIES, TOKENS, TokenGraph, kernels, lowered

STREAM = Grid(2e-4, 0, -32767, 32767, torch.int16)
RAW = "qlinear_pointwise.default"


class DyadicGraph(TokenGraph):
    """Writes graphs that hold no floats between the input's quantizer and the output."""

    def rescale(self, sums: fx.Node, ratio: Tensor, grid: Grid, axis: int = -1) -> fx.Node:
        factors = [self.constant(value) for value in dyadic_tensors(ratio.double())]
        output = grid.output()[1:]
        return self.call(OPS.rescale.default, grid, sums, 0, *factors, axis, *output)

    def accumulate(self, x: fx.Node, inputs: int, outputs: int) -> fx.Node:
        weight = self.constant(self.integers(-127, 128, outputs, inputs).to(torch.int8))
        bias = self.constant(self.integers(-9000, 9000, outputs).to(torch.int32))
        zero_point = x.meta["grid"].zero_point
        return self.function(OPS.linear_accumulate.default, x, zero_point, weight, None, bias)

    def dense(self, x: fx.Node, grid: Grid, inputs: int, outputs: int, reach: float) -> fx.Node:
        """A linear layer whose codes reach about as far as `reach`."""
        ratio = reach / (2e4 * inputs**0.5) * (0.5 + self.uniform(outputs))
        return self.rescale(self.accumulate(x, inputs, outputs), ratio, grid)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def stream(self) -> fx.Node:
        """16-bit codes of the input."""
        return self.dense(self.x, STREAM, self.channels, self.channels, 20000)


def reference_nodes(graph: fx.GraphModule) -> list[str]:
    return [n.name for n in graph.graph.nodes if n.meta.get("kernel") == "reference"]


@pytest.mark.parametrize("grid", [TOKENS, STREAM])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_linear_layer_and_its_rescaling_are_one_kernel(grid: Grid, per_channel: bool) -> None:
    graph = DyadicGraph(0, 9, 24)
    ratio = grid.qmax / 1e5 * (0.5 + graph.uniform(40 if per_channel else 1))
    y = graph.rescale(graph.accumulate(graph.x, 24, 40), ratio, grid)
    _, x86 = lowered(graph, y)
    assert kernels(x86)[RAW] == 1
    assert not reference_nodes(x86)


def test_sums_that_are_read_twice_stay() -> None:
    graph = DyadicGraph(0, 9, 24)
    sums = graph.accumulate(graph.x, 24, 40)
    ratio = torch.full((1,), 2e-3)
    ends = [graph.rescale(sums, ratio, grid) for grid in (TOKENS, STREAM)]
    _, x86 = lowered(graph, *ends, largest=0)
    assert RAW not in kernels(x86)


@pytest.mark.parametrize("grid", [TOKENS, STREAM])
@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_and_its_rescaling_are_one_kernel(grid: Grid, groups: int) -> None:
    graph = DyadicGraph(0, 1, 1)
    graph.example = torch.randn(2, 6, 8, 8)
    weight = graph.constant(graph.integers(-127, 128, 12, 6 // groups, 3, 3).to(torch.int8))
    bias = graph.constant(graph.integers(-9000, 9000, 12).to(torch.int32))
    geometry = ([2, 2], [1, 1], [1, 1], groups)
    operands = (graph.x, TOKENS.zero_point, weight, None, bias)
    sums = graph.function(OPS.conv_accumulate.default, *operands, *geometry)
    ratio = grid.qmax / 1e5 * (0.5 + graph.uniform(12))
    _, x86 = lowered(graph, graph.rescale(sums, ratio, grid, axis=1))
    assert kernels(x86)["qconv_pointwise.default"] == 1
    assert not reference_nodes(x86)


def test_a_product_of_activations_and_its_rescaling() -> None:
    graph = DyadicGraph(0, 9, 24)
    b = graph.call(torch.transpose, TOKENS, graph.x, dim0=-2, dim1=-1)
    zero_points = (TOKENS.zero_point, TOKENS.zero_point)
    sums = graph.function(OPS.matmul_accumulate.default, graph.x, zero_points[0], b, zero_points[1])
    _, x86 = lowered(graph, graph.rescale(sums, torch.tensor([4e-3]), TOKENS))
    assert kernels(x86)["product"] == 1
    assert not reference_nodes(x86)


@pytest.mark.parametrize("operator", ["layer_norm_integer", "layer_norm_power_of_two"])
@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "equal values"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_and_its_rescaling(operator: str, kind: str, bias: bool) -> None:
    graph = DyadicGraph(0, 9, 24)
    x = graph.x if kind == "8 bits" else graph.stream()
    if kind == "equal values":
        graph.example[0] = 0.1
    gamma = 0.5 + graph.uniform(24)
    gamma[3] *= -1
    beta = layer_norm_bias(graph.uniform(24) - 0.5, gamma, layer_norm_scale("integer", 24))
    shift = [graph.constant(graph.integers(0, 9, 24))] if operator.endswith("two") else []
    operands = (x, x.meta["grid"].zero_point, *shift, graph.constant(beta) if bias else None, 1)
    sums = graph.function(getattr(OPS, operator).default, *operands)
    ratio = layer_norm_scale("integer", 24) * gamma / TOKENS.scale
    _, x86 = lowered(graph, graph.rescale(sums, ratio, TOKENS))
    assert kernels(x86)["layer_norm"] == 1
    assert not reference_nodes(x86)


@pytest.mark.parametrize("scale", [0.002, 0.05, 0.4])
@pytest.mark.parametrize("step", [1 / 255, 1 / 3000])
def test_a_softmax_from_a_table(scale: float, step: float) -> None:
    grid = Grid(scale, 90, 0, 255, torch.uint8)
    graph = DyadicGraph(0, 40, 197, grid)
    graph.example = torch.randn(2, 40, 197, generator=graph.generator) * 60 * scale
    table = graph.constant(exp_table(scale))
    output = Grid(step, 0, 0, 255, torch.uint8)
    arguments = (graph.x, table, round(256 / step), 0, 255, torch.uint8, None)
    _, x86 = lowered(graph, graph.call(OPS.softmax_table.default, output, *arguments))
    assert kernels(x86)["softmax"] == 1
    assert not reference_nodes(x86)


@pytest.mark.parametrize("why", ["another table", "a mask", "a long row"])
def test_other_softmaxes_take_the_reference(why: str) -> None:
    graph = DyadicGraph(0, 2, 600 if why == "a long row" else 20)
    table = exp_table(TOKENS.scale * (1.1 if why == "another table" else 1))
    mask = graph.constant(torch.rand(2, graph.channels) > 0.5) if why == "a mask" else None
    arguments = (graph.x, graph.constant(table), 256 * 255, 0, 255, torch.uint8, mask)
    _, x86 = lowered(
        graph, graph.call(OPS.softmax_table.default, PROBABILITIES, *arguments), largest=0
    )
    assert reference_nodes(x86)


@pytest.mark.parametrize("other", ["16 bits", "8 bits"])
def test_a_residual_addition_gives_the_same_integers(other: str) -> None:
    graph = DyadicGraph(0, 9, 24)
    a, b = graph.stream(), graph.x if other == "8 bits" else graph.stream()
    ratio = 0.83 if other == "16 bits" else 31.7
    operands = (a, 0, *dyadic(0.77), b, b.meta["grid"].zero_point, *dyadic(ratio))
    y = graph.call(OPS.add_rescaled.default, STREAM, *operands, *STREAM.output()[1:])
    integer, x86 = lowered(graph, y)
    assert kernels(x86)["add_rounded"] == 1
    assert not reference_nodes(x86)
    _assert_close(integer, x86, graph.example)


def _assert_close(integer: Any, x86: Any, x: Tensor) -> None:
    with torch.no_grad():
        difference = integer(x)[0].int() - x86(x)[0].int()
    assert int(difference.abs().max()) <= 3
