from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends import check_operations
from fxquant.backends.x86.kernels import as_quantized, codes
from fxquant.backends.x86.tables import TableKernel, find_kernel, lookup, pair_table
from fxquant.backends.x86.target import X86
from fxquant.integer import build_table
from fxquant.to_integer import Grid
from tests.fxquant.backends.integer_graphs import OPS, IntegerGraph

SOURCE, RESULT = Grid(0.05, 117, 0, 255, torch.uint8), Grid(0.03, 10, 0, 255, torch.uint8)
LAST = torch.channels_last


def table(function: Callable[[Tensor], Tensor], source: Grid, result: Grid) -> Tensor:
    return build_table(function, *source.input, *result.input, result.qmin, result.qmax)


def found(
    function: Callable[[Tensor], Tensor], source: Grid = SOURCE, result: Grid = RESULT
) -> TableKernel | None:
    return find_kernel(table(function, source, result), *source.input, *result.input)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=LAST),
    "half the channels": lambda x: x.contiguous(memory_format=LAST)[:, 4:],
    "odd offset": lambda x: x.flatten()[1:],
    "odd size": lambda x: x[:, :, :5, :5],
    "one number": lambda x: x[:1, :1, :1, :1],
    "transposed": lambda x: x.transpose(0, 3),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0, 0, 0],
}


@pytest.fixture(params=LAYOUTS)
def integers(request: pytest.FixtureRequest) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 8, 6, 5), dtype=torch.uint8, generator=generator)
    return LAYOUTS[request.param](x)


def test_integers_keep_layout_and_memory_on_the_way_there_and_back(integers: Tensor) -> None:
    x = as_quantized(integers, 0.5, 3)
    assert torch.equal(x.int_repr(), integers)
    assert (x.q_scale(), x.q_zero_point(), x.stride()) == (0.5, 3, integers.stride())
    back = codes(x)
    assert torch.equal(back, integers)
    assert (back.stride(), back.data_ptr()) == (integers.stride(), integers.data_ptr())


def test_looks_up_every_layout(integers: Tensor) -> None:
    entries = torch.randint(0, 256, (256,), dtype=torch.uint8)
    y = lookup(as_quantized(integers, 0.5, 3), entries, pair_table(entries), 0.25, 7)
    assert torch.equal(codes(y), entries[integers.long()])
    assert (y.q_scale(), y.q_zero_point()) == (0.25, 7)


def test_a_look_up_keeps_channels_last() -> None:
    x = torch.zeros(1, 8, 6, 6, dtype=torch.uint8).contiguous(memory_format=LAST)
    entries = torch.arange(256).to(torch.uint8)
    y = lookup(as_quantized(x, 1.0, 0), entries, pair_table(entries), 1.0, 0)
    assert y.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    "function",
    [F.silu, F.hardswish, torch.sigmoid, torch.tanh, F.gelu, F.mish, F.hardsigmoid, F.relu],
)
def test_a_kernel_is_at_most_one_step_off(function: Callable[[Tensor], Tensor]) -> None:
    kernel = found(function)
    assert kernel is not None
    x = as_quantized(torch.arange(256).to(torch.uint8), *SOURCE.input)
    wanted = table(function, SOURCE, RESULT)
    assert (codes(kernel(x, *RESULT.input)).int() - wanted.int()).abs().max() <= 1


def test_a_clamp_needs_no_arithmetic_on_one_grid() -> None:
    kernel = found(F.relu, SOURCE, SOURCE)
    assert kernel is not None
    assert kernel.target is torch.clamp
    x = as_quantized(torch.arange(256).to(torch.uint8), *SOURCE.input)
    assert torch.equal(codes(kernel(x, *SOURCE.input)), table(F.relu, SOURCE, SOURCE))


def test_a_function_that_is_merely_near_is_no_kernel() -> None:
    # On steps of 0.2 SiLU and Hardswish are never more than one step apart.
    coarse = Grid(0.2, 10, 0, 255, torch.uint8)
    kernel = found(F.silu, SOURCE, coarse)
    assert kernel is not None
    assert kernel.target is torch.ops.aten.silu_.default


def test_an_unknown_function_has_no_kernel() -> None:
    assert found(lambda x: F.leaky_relu(x, 0.3)) is None


def test_a_table_that_clamps_further_is_looked_up() -> None:
    narrow = Grid(0.05, 3, 0, 15, torch.uint8)
    assert found(F.silu, SOURCE, narrow) is None


@pytest.mark.parametrize("function", [F.silu, F.relu, lambda x: F.leaky_relu(x, 0.3)])
def test_lowers_a_table_within_one_step(function: Callable[[Tensor], Tensor]) -> None:
    graph = IntegerGraph(0, SOURCE)
    constant = graph.constant(table(function, SOURCE, RESULT))
    y = graph.call(OPS.lookup.default, RESULT, graph.x, constant)
    floats = graph.graph.call_function(OPS.dequantize.default, (y, *RESULT.input))
    integer = graph.finish(floats)
    example = (graph.example,)
    check = check_operations(integer, X86().lower(integer, example).graph_module, example)
    assert len(check.operations) == 2
    assert check.largest <= 1
    assert check.share_differing < 0.05


def test_a_looked_up_table_is_exact() -> None:
    graph = IntegerGraph(0, SOURCE)
    constant = graph.constant(table(lambda x: F.leaky_relu(x, 0.3), SOURCE, RESULT))
    y = graph.call(OPS.lookup.default, RESULT, graph.x, constant)
    floats = graph.graph.call_function(OPS.dequantize.default, (y, *RESULT.input))
    integer = graph.finish(floats)
    lowered = X86().lower(integer, (graph.example,)).graph_module
    assert any(node.target is lookup for node in lowered.graph.nodes)
    assert torch.equal(lowered(graph.example)[0], integer(graph.example)[0])
