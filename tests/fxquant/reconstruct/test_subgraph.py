from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.reconstruct.subgraph import cut, network_output, order_steps, work_bytes
from passes.blocks.partition import partition_blocks
from passes.infra import verify
from tests.fxquant.reconstruct.graphs import graphs
from tests.fxquant.small_networks import module


def values(graph: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Every node's value."""

    class Recorder(fx.Interpreter):
        seen: dict[str, Tensor]

        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            self.seen[n.name] = result
            return result

    recorder = Recorder(graph)
    recorder.seen = {}
    with torch.no_grad():
        recorder.run(x)
    return recorder.seen


@pytest.mark.parametrize("granularity", ["layer", "block", "stage", "model"])
@pytest.mark.parametrize("stage", ["fused", "simulated"])
def test_the_parts_in_order_make_the_whole(granularity: str, stage: str) -> None:
    found = graphs()
    x = torch.randn(3, 3, 8, 8)
    graph = getattr(found, stage)
    blocks = partition_blocks(found.fused, granularity)  # type: ignore[arg-type]
    steps = order_steps(found.fused, blocks, {block.name for block in blocks}, end=True)
    boundary = {step.output for step in steps} | {n for step in steps for n in step.inputs}
    known = {"x": x}
    with torch.no_grad():
        for step in steps:
            part = cut(graph, step.output, boundary)
            assert part.inputs == step.inputs
            known[step.output] = part.module(*(known[name] for name in part.inputs))
    last = network_output(found.fused)
    assert last is not None
    assert torch.equal(known[last], values(graph, x)[last])


def test_quantizers_belong_to_the_part_that_reads() -> None:
    found = graphs()
    blocks = partition_blocks(found.fused, "block")
    part = cut(found.simulated, blocks[1].output, set(blocks[1].inputs))
    targets = [str(node.target) for node in part.module.graph.nodes]
    assert any(target.startswith("quantizers.") for target in targets)
    assert part.inputs == blocks[1].inputs


def test_sizes_are_those_of_the_batch_at_hand() -> None:
    model = module(
        lambda self, x: torch.reshape(F.relu(self.a(x)), (x.size(0), -1)) * x.size(2),
        a=nn.Conv2d(3, 4, 1),
    )
    found = graphs(model)
    seen = values(found.fused, x := torch.randn(5, 3, 8, 8))
    last = network_output(found.fused)
    assert last is not None
    layer = next(n.name for n in found.fused.graph.nodes if n.op == "call_module")
    part = cut(found.fused, last, {layer})
    assert part.inputs == (layer,)
    with torch.no_grad():
        assert torch.equal(part.module(seen[layer]), found.fused(x))


def test_what_no_block_needs_is_no_step() -> None:
    found = graphs()
    blocks = partition_blocks(found.fused, "block")
    steps = order_steps(found.fused, blocks, {blocks[0].name}, end=False)
    assert [step.block for step in steps] == [blocks[0].name]


def test_the_work_of_a_part_grows_with_its_values() -> None:
    model = module(lambda self, x: torch.relu(torch.exp(x)))
    graph = fx.symbolic_trace(model)
    verify.run_and_annotate(graph, (torch.zeros(2, 3, 4, 4),), name="test")
    # Three values of 48 floats an image: the input, its exponential, and what is left of that.
    assert work_bytes(graph) == 7 * 3 * 48 * 4
