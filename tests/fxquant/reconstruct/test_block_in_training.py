from __future__ import annotations

import pytest
import torch

from fxquant.reconstruct.block_in_training import BlockInTraining, _Mix
from fxquant.reconstruct.subgraph import Subgraph, cut
from passes.blocks.partition import partition_blocks
from tests.fxquant.reconstruct.graphs import Graphs, graphs

CPU = torch.device("cpu")


def residual(found: Graphs) -> Subgraph:
    block = partition_blocks(found.fused, "block")[1]
    return cut(found.simulated, block.output, set(block.inputs))


def test_untrained_and_without_dropping_it_computes_what_the_graph_does() -> None:
    part = residual(graphs(changes={"weights.bits": 8}))
    (name,) = part.inputs
    x = torch.rand(4, 8, 8, 8)
    steps = [str(n.target) for n in part.module.graph.nodes if "quantizers" in str(n.target)]
    block = BlockInTraining(part, steps, 0.5, CPU)
    assert set(block.steps) == set(steps)
    block.harden()
    with torch.no_grad():
        ours = block({name: x}, {name: x})
        assert torch.equal(ours, part.module(x))


@pytest.mark.parametrize(("drop", "low", "high"), [(0.5, 0.45, 0.55), (1.0, 1.0, 1.0)])
def test_values_are_float_with_the_probability(drop: float, low: float, high: float) -> None:
    part = residual(graphs())
    block = BlockInTraining(part, [], drop, CPU)
    quantized, value = torch.zeros(4, 8, 8, 8), torch.ones(4, 8, 8, 8)
    with block.dropping(4, torch.arange(4), 1):
        share = float(block.drop(quantized, value).mean())
    assert low <= share <= high
    assert torch.equal(block.drop(quantized, value), quantized)


def test_a_part_of_a_batch_drops_what_the_whole_batch_does() -> None:
    block = BlockInTraining(residual(graphs()), [], 0.5, CPU)
    quantized, value = torch.zeros(6, 8, 4, 4), torch.ones(6, 8, 4, 4)
    with block.dropping(6, torch.arange(6), 3):
        whole = block.drop(quantized, value)
    mine = torch.tensor([1, 4])
    with block.dropping(6, mine, 3):
        assert torch.equal(block.drop(quantized[mine], value[mine]), whole[mine])


def test_all_dropped_it_computes_on_the_float_input() -> None:
    found = graphs(changes={"weights.bits": 8})
    part = residual(found)
    (name,) = part.inputs
    block = BlockInTraining(part, [], 1.0, CPU)
    x, floats = torch.zeros(2, 8, 8, 8), torch.rand(2, 8, 8, 8)
    output = partition_blocks(found.fused, "block")[1].output
    target = cut(found.fused, output, {name}).module
    with block.dropping(2, torch.arange(2), 0), torch.no_grad():
        # The soft weight is the float weight, and no activation is quantized.
        torch.testing.assert_close(
            block({name: x}, {name: floats}), target(floats), atol=0.05, rtol=0
        )


def test_the_graph_it_is_made_from_stays_as_it_is() -> None:
    found = graphs()
    part = residual(found)
    x = torch.rand(2, 8, 8, 8)
    with torch.no_grad():
        before = part.module(x)
        BlockInTraining(part, ["quantizers.stem"], 0.5, CPU).harden()
        assert torch.equal(part.module(x), before)


def test_what_is_dropped_is_chosen_exactly_and_so_are_its_gradients() -> None:
    quantized, value = (torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2))
    keep, gradient = torch.rand(4, 3, 5, 5) > 0.5, torch.randn(4, 3, 5, 5)
    found = _Mix.apply(quantized, value, keep)
    wanted = torch.where(keep, quantized, value)
    assert torch.equal(found, wanted)
    for mixed in (found, wanted):
        quantized.grad = value.grad = None
        mixed.backward(gradient)
        assert torch.equal(quantized.grad, gradient * keep)
        assert torch.equal(value.grad, gradient * ~keep)
