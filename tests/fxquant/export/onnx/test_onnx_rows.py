"""The operators of integers alone as ONNX: no integer differs, optimized or as written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxquant.export.onnx.runtimes import onnxruntime_run
from fxquant.integer.gelu import shift_gelu_constants
from fxquant.integer.rescale import dyadic
from fxquant.integer.softmax import exp_table, log_softmax_constants, shiftmax_constants
from fxquant.to_integer import Grid
from tests.fxquant.backends.integer_graphs import AFFINE, ONE_SIDED, OPS, IntegerGraph
from tests.fxquant.export.onnx.lock_step import EXACT, PORTABLE, lock_step, model_of, seen

INT32 = Grid(1.0, 0, -(2**31), 2**31 - 1, torch.int32)
INT64 = Grid(1.0, 0, -(2**63), 2**63 - 1, torch.int64)
SIXTEEN = Grid(0.0007, 0, -32767, 32767, torch.int16)


def exact(graph: IntegerGraph, *outputs: fx.Node, values: int = 10) -> None:
    module = graph.finish(*outputs)
    for node in outputs:
        assert len(seen(module, graph.example, node.name).unique()) > values
    for optimize in (True, False):
        found = lock_step(module, graph.example, EXACT, optimize=optimize)
        assert found.differing == 0, found.operations


def sixteen(graph: IntegerGraph) -> fx.Node:
    return graph.call(OPS.quantize.default, SIXTEEN, graph.input, *SIXTEEN.output())


def rows(seed: int, bits: int) -> tuple[IntegerGraph, fx.Node, Grid]:
    """Rows of 40 codes, one of them of equal codes."""
    graph = IntegerGraph(seed, AFFINE)
    graph.example = torch.randn(2, 6, 5, 40, generator=graph.generator) * 2
    graph.example[0, 0, 0] = 0.5
    return graph, graph.x if bits == 8 else sixteen(graph), AFFINE if bits == 8 else SIXTEEN


@pytest.mark.parametrize("bits", [8, 16])
def test_sums_leave_layers_as_they_are(bits: int) -> None:
    graph = IntegerGraph(0, AFFINE)
    x, grid = (graph.x, AFFINE) if bits == 8 else (sixteen(graph), SIXTEEN)
    wide = INT32 if bits == 8 else INT64
    weight = graph.constant(graph.integers(-127, 128, 4, 6, 3, 3).to(torch.int8))
    bias = graph.constant(graph.integers(-9000, 9000, 4).to(torch.int32))
    window = ([1, 1], [1, 1], [1, 1], 1)
    conv: Any = OPS.conv_accumulate.default
    sums = graph.call(conv, wide, x, grid.zero_point, weight, None, bias, *window)
    matrix = graph.constant(graph.integers(-127, 128, 7, 5).to(torch.int8))
    linear = (matrix, None, graph.constant(graph.integers(-9000, 9000, 7).to(torch.int32)))
    lines = graph.call(OPS.linear_accumulate.default, wide, x, grid.zero_point, *linear)
    squares = graph.call(
        OPS.matmul_accumulate.default, wide, x, grid.zero_point, x, grid.zero_point
    )
    products = graph.call(OPS.mul_accumulate.default, wide, x, grid.zero_point, x, grid.zero_point)
    total = graph.call(OPS.sum_accumulate.default, INT64, x, grid.zero_point, [2, 3], False)
    exact(graph, sums, lines, squares, products, total)


@pytest.mark.parametrize("ratio", [0.9, 3e-4, 2.0**-33, 300.0])
@pytest.mark.parametrize("channels", [1, 6])
def test_rescaling_rounds_half_to_even(ratio: float, channels: int) -> None:
    graph = IntegerGraph(1, AFFINE)
    pairs = [dyadic(ratio * (1 + 0.1 * index)) for index in range(channels)]
    multiplier, shift = (graph.constant(torch.tensor(part)) for part in zip(*pairs, strict=True))
    x = sixteen(graph)
    squares = graph.call(OPS.mul_accumulate.default, INT64, x, 0, x, 0)
    args = (squares, 0, multiplier, shift, 1, 3, -(2**31), 2**31 - 1, torch.int32)
    y = graph.call(OPS.rescale.default, INT32, *args)
    exact(graph, y, values=10 if ratio > 1e-6 else 0)


def test_rescaling_of_more_than_62_bits_is_done_in_parts() -> None:
    graph = IntegerGraph(2, AFFINE)
    x = sixteen(graph)
    wide = graph.call(OPS.mul_accumulate.default, INT64, x, 0, x, 0)
    bias = graph.constant(torch.full((5,), 2**50, dtype=torch.int64))
    wide = graph.call(OPS.layer_norm_integer.default, INT64, x, 0, bias, 1)
    pairs = [dyadic(2.0**-40 * (1 + 0.1 * index)) for index in range(5)]
    multiplier, shift = (graph.constant(torch.tensor(part)) for part in zip(*pairs, strict=True))
    args = (wide, 5, multiplier, shift, -1, 0, -(2**31), 2**31 - 1, torch.int32)
    exact(graph, graph.call(OPS.rescale.default, INT32, *args), values=4)


def test_two_branches_are_rounded_on_their_own() -> None:
    graph = IntegerGraph(3, AFFINE)
    x = sixteen(graph)
    args = (x, 0, *dyadic(0.7), graph.x, AFFINE.zero_point, *dyadic(41.5))
    exact(graph, graph.call(OPS.add_rescaled.default, SIXTEEN, *args, *SIXTEEN.output()[1:]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["table", "i-vit", "log2"])
def test_softmax_of_codes(kind: str, masked: bool) -> None:
    graph, x, grid = rows(4, 8)
    mask = None
    if masked:
        hidden = torch.ones(5, 40, dtype=torch.bool)
        hidden[1], hidden[2, ::2] = False, False
        mask = graph.constant(hidden)
    y = Grid(1 / 256, 0, 0, 255, torch.uint8)
    if kind == "table":
        table = graph.constant(exp_table(grid.scale))
        args: tuple[Any, ...] = (x, table, 65536, 0, 255, torch.uint8, mask)
        exact(graph, graph.call(OPS.softmax_table.default, y, *args))
    elif kind == "i-vit":
        args = (x, grid.zero_point, *shiftmax_constants(grid.scale, 40), 8, mask)
        exact(graph, graph.call(OPS.softmax_i_vit.default, y, *args))
    else:
        args = (x, grid.zero_point, *log_softmax_constants(grid.scale, 40), 4, mask)
        wide = Grid(2.0**-15, 0, 0, 32767, torch.int16)
        exact(graph, graph.call(OPS.softmax_log2.default, wide, *args), values=6)


@pytest.mark.parametrize("bits", [8, 16])
def test_shift_gelu_looks_at_the_maximum_of_its_row(bits: int) -> None:
    graph, x, grid = rows(5, bits)
    args = (x, grid.zero_point, *shift_gelu_constants(grid.scale, 40), 8)
    wide = INT32 if bits == 8 else INT64
    exact(graph, graph.call(OPS.gelu_i_vit.default, wide, *args))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["integer", "i-vit", "power_of_two"])
def test_layer_norms_of_codes(kind: str, bits: int) -> None:
    graph, x, grid = rows(6, bits)
    bias = graph.constant(graph.integers(-(2**20), 2**20, 40))
    shifts = graph.constant(graph.integers(0, 4, 40))
    operators: dict[str, tuple[Any, tuple[fx.Node, ...]]] = {
        "integer": (OPS.layer_norm_integer.default, ()),
        "i-vit": (OPS.layer_norm_i_vit.default, ()),
        "power_of_two": (OPS.layer_norm_power_of_two.default, (shifts,)),
    }
    operator, more = operators[kind]
    exact(graph, graph.call(operator, INT64, x, grid.zero_point, *more, bias, 1))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dim", [-1, 1])
def test_division_by_the_norm(bits: int, dim: int) -> None:
    graph, x, grid = rows(7, bits)
    y = Grid(2.0**-15, 0, -32767, 32767, torch.int16)
    exact(graph, graph.call(OPS.normalize_integer.default, y, x, grid.zero_point, dim))


def extremes() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 12, generator=random)
    return {
        "both signs": x,
        "positive": x.abs() + 1,
        "negative": -x.abs() - 1,
        "tiny": x * 1e-5,
        "tiny and positive": x.abs() * 1e-6,
        "tiny and negative": -x.abs() * 1e-6,
        "zeros": x * 0,
        "large": x * 1e6,
    }


@pytest.mark.parametrize("case", extremes())
def test_a_dynamic_layer_chooses_its_grid_as_the_reference_does(case: str) -> None:
    graph = IntegerGraph(8, ONE_SIDED)
    graph.graph.erase_node(graph.x)
    graph.example = extremes()[case]
    weight = graph.constant(graph.integers(-127, 128, 7, 12).to(torch.int8))
    scale = graph.constant(torch.rand(7, generator=graph.generator))
    bias = graph.constant(torch.randn(7, generator=graph.generator))
    layer: Any = OPS.linear_dynamic.default
    module = graph.finish(graph.graph.call_function(layer, (graph.input, weight, scale, bias)))
    (want,) = module(graph.example)
    for options in (EXACT, PORTABLE):
        run = onnxruntime_run(model_of(module, graph.example, options))
        (found,) = run({"input": graph.example.numpy()}).values()
        if options is EXACT:
            assert torch.equal(torch.from_numpy(found), want)
        elif "tiny" not in case:
            # One step of the input in every product.
            step = (graph.example.max().clamp(min=0) - graph.example.min().clamp(max=0)) / 255
            bound = step * (127 * 12 * scale_of(module))
            assert bool(((torch.from_numpy(found) - want).abs() <= bound + 1e-6).all())


def scale_of(module: fx.GraphModule) -> Tensor:
    return next(b for b in module.buffers() if b.dtype == torch.float32)
