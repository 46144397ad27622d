"""Float operations between integers: exact, or a step of the next quantizer from torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.backends.native.lower import lower_to_native
from fxquant.to_integer import Grid
from passes import softmax_numerators
from passes.infra.verify import run_and_annotate
from tests.fxquant.backends.integer_graphs import OPS

pytestmark = pytest.mark.usefixtures("native")
FINE = Grid(1 / 512, 3, 0, 255, torch.uint8)
COARSE = Grid(0.05, 120, 0, 255, torch.uint8)


def outputs(function: Any, *constants: Tensor, grid: Grid = COARSE, **kwargs: Any) -> Any:
    """Integers of the reference and of the native target behind a function of dequantized codes."""
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    extra = []
    for index, constant in enumerate(constants):
        root.register_buffer(f"constant_{index}", constant)
        extra.append(graph.get_attr(f"constant_{index}"))
    result = graph.call_function(function, (x, *extra), kwargs)
    codes = graph.call_function(OPS.quantize.default, (result, *grid.output()))
    codes.meta["grid"] = grid
    graph.output((codes,))
    module = fx.GraphModule(root, graph)
    sample = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(0)) * 4
    run_and_annotate(module, (sample,), name="graph")
    lowered, called = lower_to_native(module, (sample,), frozenset())
    assert not called
    more = torch.cat([sample, sample.flip(0) * 2])
    return module(more)[0], lowered(more)[0]


def steps(expected: Tensor, found: Tensor) -> Tensor:
    assert expected.shape == found.shape
    assert len(expected.unique()) > 20, "nearly all codes are clamped"
    return (expected.int() - found.int()).abs()


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (3, 5, 37)])
def test_a_sum_or_product_with_a_constant_is_exact(function: Any, shape: tuple[int, ...]) -> None:
    if len(shape) == 3:
        shape = (1, 5, 37)
    expected, found = outputs(function, torch.randn(shape))
    assert torch.equal(expected, found)


def test_relu_is_exact() -> None:
    expected, found = outputs(F.relu)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("function", [F.gelu, softmax_numerators])
def test_a_function_is_a_step_off_at_most(function: Any) -> None:
    difference = steps(*outputs(function, grid=COARSE if function is F.gelu else FINE))
    assert int(difference.max()) <= 1
    # A value changes its code only where it is within 4 ulp of a tie: 2^-21 of its steps.
    assert float((difference > 0).float().mean()) < 1e-2


def test_softmax_is_a_step_off_at_most() -> None:
    difference = steps(*outputs(F.softmax, grid=FINE, dim=-1))
    assert int(difference.max()) <= 1


def test_layer_norm_is_a_step_off_at_most() -> None:
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("weight", torch.randn(37))
    root.register_buffer("bias", torch.randn(37))
    x = graph.placeholder("x")
    normed = graph.call_function(
        F.layer_norm, (x, (37,), graph.get_attr("weight"), graph.get_attr("bias"), 1e-6)
    )
    codes = graph.call_function(OPS.quantize.default, (normed, *COARSE.output()))
    codes.meta["grid"] = COARSE
    graph.output((codes,))
    module = fx.GraphModule(root, graph)
    sample = torch.randn(2, 6, 37) * 3 + 50
    run_and_annotate(module, (sample,), name="graph")
    lowered, _ = lower_to_native(module, (sample,), frozenset())
    assert int(steps(module(sample)[0], lowered(sample)[0]).max()) <= 1
    assert lowered.meta["approximated"] == 1
