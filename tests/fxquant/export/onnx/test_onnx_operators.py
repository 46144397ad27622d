"""Each operator as ONNX gives the reference's integers in ONNX Runtime."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.to_integer import Grid
from tests.fxquant.backends.integer_graphs import AFFINE, ONE_SIDED, OPS, IntegerGraph
from tests.fxquant.export.onnx.lock_step import (
    EXACT,
    NEUTRAL,
    PORTABLE,
    exact_everywhere,
    kinds,
    lock_step,
    model_of,
    seen,
)

SIGNED = Grid(0.03, -3, -128, 127, torch.int8)
SIXTEEN = Grid(0.0007, 0, -32767, 32767, torch.int16)
FOUR = Grid(0.3, 5, 0, 15, torch.uint8)


def checked(graph: IntegerGraph, *outputs: fx.Node) -> fx.GraphModule:
    module = graph.finish(*outputs)
    for node in outputs:
        codes = seen(module, graph.example, node.name)
        assert len(codes.unique()) > 10, "nearly all codes are clamped"
    exact_everywhere(module, graph.example)
    return module


@pytest.mark.parametrize("grid", [ONE_SIDED, AFFINE, FOUR], ids=["one-sided", "affine", "4 bits"])
@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_is_one_operator_on_codes(grid: Grid, relu: bool) -> None:
    graph = IntegerGraph(0, AFFINE)
    y = graph.conv(graph.x, grid, 6, 8, kernel=3, relu=relu)
    module = checked(graph, y)
    assert kinds(model_of(module, graph.example, EXACT))["QLinearConv"] == 1
    assert kinds(model_of(module, graph.example, PORTABLE))["Conv"] == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_pads_with_the_zero_point(stride: int) -> None:
    graph = IntegerGraph(1, AFFINE)
    checked(graph, graph.depthwise(graph.x, AFFINE, 6, stride=stride))


def test_a_residual_is_carried_through_float_sums_of_integers() -> None:
    graph = IntegerGraph(2, AFFINE)
    first = graph.conv(graph.x, ONE_SIDED, 6, 6, kernel=3)
    y = graph.conv(first, AFFINE, 6, 6, kernel=3, residual=graph.x)
    module = checked(graph, y)
    found = kinds(model_of(module, graph.example, EXACT))
    assert found["Conv"] == 1
    assert found["ConvInteger"] == 0


def test_sums_beyond_2_24_are_integers() -> None:
    graph = IntegerGraph(3, ONE_SIDED)
    wide = graph.conv(graph.x, ONE_SIDED, 6, 600)
    y = graph.conv(wide, AFFINE, 600, 6, kernel=3, residual=graph.x)
    module = checked(graph, y)
    assert kinds(model_of(module, graph.example, EXACT))["ConvInteger"] == 1


def test_a_multiplier_that_two_roundings_would_miss_is_written_as_it_is() -> None:
    # Of 6,000 channels the true scales give another multiplier for more than half: neutral ones
    # are the only way to the reference's.
    graph = IntegerGraph(4, AFFINE)
    module = graph.finish(graph.conv(graph.x, AFFINE, 6, 6000))
    assert lock_step(module, graph.example, EXACT).differing == 0
    assert lock_step(module, graph.example, NEUTRAL).differing == 0


def test_weights_of_4_bits_are_stored_in_4() -> None:
    graph = IntegerGraph(5, AFFINE)
    weight = graph.constant(graph.integers(-7, 8, 8, 6, 3, 3).to(torch.int8))
    scale = graph.constant(torch.rand(8, generator=graph.generator) * 0.01 + 0.01)
    window = ([1, 1], [1, 1], [1, 1], 1)
    y = graph.call(
        OPS.conv.default, AFFINE, graph.x, *AFFINE.input, weight, scale, None, None, *window,
        *AFFINE.output(),
    )  # fmt: skip
    module = checked(graph, y)
    stored = model_of(module, graph.example, PORTABLE).graph.initializers.values()
    assert [value.shape.numpy() for value in stored if value.dtype.name == "INT4"] == [(8, 6, 3, 3)]


@pytest.mark.parametrize("kind", ["add", "mul"])
@pytest.mark.parametrize("other", [ONE_SIDED, SIGNED], ids=["uint8", "int8"])
def test_sums_and_products_of_two_values_round_each_product_alone(kind: str, other: Grid) -> None:
    graph = IntegerGraph(6, AFFINE)
    b = graph.call(OPS.quantize.default, other, graph.input, *other.output())
    operator: Any = {"add": OPS.add.default, "mul": OPS.mul.default}[kind]
    y = graph.call(operator, AFFINE, graph.x, *AFFINE.input, b, *other.input, *AFFINE.output())
    checked(graph, y)


def test_a_batch_norm_that_stands_alone() -> None:
    graph = IntegerGraph(7, AFFINE)
    weight, bias = (graph.constant(torch.randn(6, generator=graph.generator)) for _ in range(2))
    args = (graph.x, *AFFINE.input, weight, bias, *AFFINE.output())
    checked(graph, graph.call(OPS.channel_affine.default, AFFINE, *args))


def test_a_table_is_a_gather() -> None:
    graph = IntegerGraph(8, AFFINE)
    table = graph.constant(torch.randperm(256, generator=graph.generator).to(torch.uint8))
    module = checked(graph, graph.call(OPS.lookup.default, AFFINE, graph.x, table))
    assert kinds(model_of(module, graph.example, PORTABLE))["Gather"] == 1


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_maxima_of_windows(ceil_mode: bool) -> None:
    graph = IntegerGraph(9, AFFINE)
    window = ([2, 3], [2, 2], [1, 1], [1, 1], ceil_mode)
    checked(graph, graph.call(OPS.max_pool.default, AFFINE, graph.x, *window))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_averages_of_windows_are_sums_and_one_product(include: bool, ceil_mode: bool) -> None:
    graph = IntegerGraph(10, AFFINE)
    fine = Grid(0.011, 110, 0, 255, torch.uint8)
    window = ([3, 3], [2, 2], [1, 1], ceil_mode, include, None)
    args = (graph.x, *AFFINE.input, *window, *fine.output())
    checked(graph, graph.call(OPS.avg_pool.default, fine, *args))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5)])
def test_averages_of_a_given_number_of_windows(size: tuple[int, int]) -> None:
    graph = IntegerGraph(11, AFFINE, channels=40)
    fine = Grid(0.011, 110, 0, 255, torch.uint8)
    args = (graph.x, *AFFINE.input, list(size), *fine.output())
    checked(graph, graph.call(OPS.adaptive_avg_pool.default, fine, *args))


def test_a_mean_over_some_dimensions() -> None:
    graph = IntegerGraph(12, AFFINE, channels=40)
    fine = Grid(0.011, 110, 0, 255, torch.uint8)
    args = (graph.x, *AFFINE.input, [2, 3], False, *fine.output())
    checked(graph, graph.call(OPS.mean.default, fine, *args))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [2, 4])
def test_a_linear_layer_reads_rows_or_is_a_product_in_portable_files(rank: int, bias: bool) -> None:
    graph = IntegerGraph(13, AFFINE)
    x = graph.x if rank == 4 else graph.call(torch.flatten, AFFINE, graph.x, 1)
    inputs = 5 if rank == 4 else 150
    weight = graph.constant(graph.integers(-127, 128, 7, inputs).to(torch.int8))
    scale = graph.constant(torch.rand(7, generator=graph.generator) * 0.001 + 0.0005)
    biases = graph.constant(graph.integers(-900, 900, 7).to(torch.int32)) if bias else None
    layer = (weight, scale, None, biases)
    y = graph.call(OPS.linear.default, AFFINE, x, *AFFINE.input, *layer, *AFFINE.output())
    module = checked(graph, y)
    # OpenVINO does not load Gemm between two reshapes.
    found = kinds(model_of(module, graph.example, PORTABLE))
    assert found["Reshape" if rank == 4 else "MatMul"] == 0
    assert found["MatMul" if rank == 4 else "Gemm"] == 1


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_a_product_of_two_activations(alpha: float) -> None:
    graph = IntegerGraph(14, AFFINE)
    b = graph.call(torch.transpose, AFFINE, graph.x, 2, 3)
    wide = Grid(0.2 * alpha, 90, 0, 255, torch.uint8)
    args = (graph.x, *AFFINE.input, b, *AFFINE.input, alpha, *wide.output())
    checked(graph, graph.call(OPS.matmul.default, wide, *args))


def test_a_mean_weighted_by_rows_of_zeros_is_zero() -> None:
    graph = IntegerGraph(15, ONE_SIDED)
    b = graph.call(torch.transpose, ONE_SIDED, graph.x, 2, 3)
    fine = Grid(0.012, 3, 0, 255, torch.uint8)
    args = (graph.x, 0, b, *ONE_SIDED.input, *fine.output())
    graph.example[0, 0] = -1.0
    checked(graph, graph.call(OPS.weighted_mean.default, fine, *args))


def test_movement_works_on_the_codes_themselves() -> None:
    graph = IntegerGraph(16, AFFINE)
    left, right = graph.halves(graph.x)
    y = graph.shuffle(graph.cat(right, left))
    y = graph.call(torch.nn.functional.pad, AFFINE, y, [1, 2, 0, 1], value=AFFINE.zero_point)
    y = graph.call(torch.roll, AFFINE, y, shifts=(1, -2), dims=(2, 3))
    y = graph.call(torch.nn.functional.interpolate, AFFINE, y, scale_factor=2)
    y = graph.call(torch.permute, AFFINE, y, (0, 2, 3, 1))
    y = graph.call(torch.stack, AFFINE, [y, y], dim=-1)
    y = graph.call(torch.select, AFFINE, y, 4, 1)
    y = graph.call(torch.flip, AFFINE, y, [1])
    cut = (slice(None), slice(1, None, 3), Ellipsis, 2)
    checked(graph, graph.call(operator.getitem, AFFINE, y, cut))


def test_16_bit_codes_of_a_layer() -> None:
    graph = IntegerGraph(17, AFFINE)
    wide = graph.call(OPS.quantize.default, SIXTEEN, graph.input, *SIXTEEN.output())
    # Of 16-bit codes `conv` sees a scale for each.
    y = graph.conv(wide, Grid(0.001, 0, -32767, 32767, torch.int16), 6, 6, kernel=3)
    module = graph.finish(y)
    for optimize in (True, False):
        found = lock_step(module, graph.example, EXACT, optimize=optimize)
        assert found.differing == 0, found.operations
    assert lock_step(module, graph.example, PORTABLE).largest <= 1
    model = model_of(module, graph.example, PORTABLE)
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    types = {node.inputs[2].dtype.name for node in nodes}
    assert types == {"UINT8", "INT16"}, "the 8-bit input of the graph, and the layer's"
    assert (kinds(model)["Conv"], kinds(model)["ConvInteger"]) == (1, 0)
    assert model.graph.opset_imports[""] == 21, "the first whose QuantizeLinear has 16 bits"
