"""A target against the reference, operation by operation on the same integers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.backends import LoweredGraph, check_operations
from fxquant.backends.check import whole_network
from fxquant.backends.x86.target import X86
from tests.fxquant.small_networks import compiled, images


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()


def test_the_reference_is_equal_to_itself() -> None:
    integer = compiled(chain()).stages["integer"]
    found = check_operations(integer, integer, (images(),))
    assert (found.largest, found.output_differing, found.output_sqnr_db) == (0, 0.0, math.inf)


def test_every_operation_has_an_entry() -> None:
    q = compiled(chain(), {"quantize_output": True})
    found = check_operations(q.stages["integer"], q.stages["x86"], (images(),))
    names = [n.name for n in q.stages["integer"].graph.nodes if "grid" in n.meta]
    assert [entry.node for entry in found.operations] == names
    assert all(entry.values > 0 for entry in found.operations)


def off_by(steps: int, graph: fx.GraphModule, node: fx.Node) -> None:
    def wrong(q: Any) -> Any:
        codes = (q.int_repr().to(torch.int32) + steps).clamp(0, 255).to(torch.uint8)
        return torch._make_per_tensor_quantized_tensor(codes, q.q_scale(), q.q_zero_point())

    with graph.graph.inserting_after(node):
        late = graph.graph.call_function(wrong, (node,))
    late.meta = dict(node.meta)
    node.replace_all_uses_with(late, lambda user: user is not late)
    graph.recompile()


def test_an_error_is_charged_to_its_operation_alone() -> None:
    q = compiled(chain(), {"quantize_output": True})
    graph = q.stages["x86"]
    first = next(n for n in graph.graph.nodes if "conv2d" in str(n.target))
    off_by(3, graph, first)
    found = check_operations(q.stages["integer"], graph, (images(),))
    largest = {entry.node: entry.largest for entry in found.operations}
    assert largest.pop(first.meta["integer"]) in (3, 4)
    assert max(largest.values()) <= 1
    assert found.output_differing > 0
    assert 0 < found.share_differing < 1


def test_a_kernel_that_is_off_is_replaced_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = X86.lower

    def broken(self: X86, *arguments: Any) -> LoweredGraph:
        lowered = lower(self, *arguments)
        graph = lowered.graph_module
        for node in list(graph.graph.nodes):
            if "conv2d" in str(node.target):
                off_by(5, graph, node)
        return lowered

    monkeypatch.setattr(X86, "lower", broken)
    q = compiled(chain(), {"quantize_output": True})
    notes = q.report.target_notes
    assert sum("steps off; the reference operator runs instead" in note for note in notes) == 2
    assert not any("no kernel for" in note and "conv" in note for note in notes)
    assert q.report.target_check["largest_difference"] <= 1
    assert torch.equal(q(images()), q.stages["integer"](images()))


def test_a_kernel_whose_floats_are_off_is_replaced_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(8)).eval()
    lower = X86.lower

    def broken(self: X86, *arguments: Any) -> LoweredGraph:
        lowered = lower(self, *arguments)
        for node in lowered.graph_module.graph.nodes:
            if "qconv" in str(node.target):
                node.update_arg(1, 2 * node.args[1])  # the scale of its input
        lowered.graph_module.recompile()
        return lowered

    monkeypatch.setattr(X86, "lower", broken)
    q = compiled(model)
    assert sum("the reference operator runs instead" in note for note in q.report.target_notes) == 1
    assert torch.equal(q(images()), q.stages["integer"](images()))


def test_lowering_again_keeps_the_named_nodes() -> None:
    integer = compiled(chain()).stages["integer"]
    names = [n.name for n in integer.graph.nodes if "conv" in str(n.target)]
    kept = X86().lower(integer, (images(),), frozenset(names[:1])).graph_module
    reference = [n for n in kept.graph.nodes if n.meta.get("kernel") == "reference"]
    assert [n.meta["integer"] for n in reference] == names[:1]
    assert torch.allclose(kept(images()), integer(images()), atol=1e-5)


def test_whole_networks_are_compared_over_all_outputs() -> None:
    a = {"x": torch.tensor([3.0, 4.0]), "y": [torch.tensor([0.0])]}
    b = {"x": torch.tensor([3.0, 4.5]), "y": [torch.tensor([0.0])]}
    differing, sqnr = whole_network(a, b)
    assert differing == pytest.approx(1 / 3)
    assert sqnr == pytest.approx(20.0)
