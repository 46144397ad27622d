from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.blocks.flow import Flow, data_flow
from passes.blocks.merging import merge_all, merge_modules, merge_resolutions
from passes.blocks.parts import Part
from tests.passes.models import annotated, image, make


def parts_of(model: nn.Module, **of_last: Any) -> tuple[Flow, list[Part]]:
    """The flow of a model, and a part for each of its layers; `of_last` are those of the last."""
    flow = data_flow(annotated(model, image()).graph)
    layers = [node for node in flow.reads if node.op == "call_module"]
    parts = [Part({node}, node, "layer") for node in layers]
    for name, value in of_last.items():
        setattr(parts[-1], name, value)
    return flow, parts


def paths(parts: list[Part]) -> list[list[str]]:
    return [part.paths() for part in parts]


def in_a_row(*strides: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(3, 3, 1, stride) for stride in strides)).eval()


def with_modules(*lengths: int) -> nn.Module:
    """Modules of so many layers each, in a row."""
    rows = (nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(length))) for length in lengths)
    return nn.Sequential(*rows).eval()


# -- by resolution ---------------------------------------------------------------------------------


def test_layers_of_one_resolution_are_one_part() -> None:
    flow, parts = parts_of(in_a_row(1, 1, 2, 1))
    merged = merge_resolutions(flow, parts)
    assert paths(merged) == [["0", "1"], ["2", "3"]]
    assert [part.rule for part in merged] == ["resolution", "resolution"]
    assert merged[0].children == parts[:2]
    assert merged[0].output is parts[1].output


def test_an_attention_begins_a_part() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.c(torch.matmul(y, torch.sigmoid(y)))

    convolutions = {name: nn.Conv2d(3, 3, 1) for name in "abc"}
    flow, parts = parts_of(make(forward, **convolutions))
    product = next(node for node in flow.reads if node.target is torch.matmul)
    gate = next(node for node in flow.reads if node.target is torch.sigmoid)
    parts[1].nodes |= {product, gate}
    parts[1].output = product
    assert paths(merge_resolutions(flow, parts)) == [["a"], ["b", "c"]]


def test_what_a_selector_picked_is_not_merged() -> None:
    flow, parts = parts_of(in_a_row(1, 1, 1), rule="named")
    assert paths(merge_resolutions(flow, parts)) == [["0", "1"], ["2"]]
    assert paths(merge_all(flow, parts)) == [["0", "1"], ["2"]]


# -- all -------------------------------------------------------------------------------------------


def test_the_network_is_one_part_with_what_lies_between() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    flow, parts = parts_of(make(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1, 2)))
    (merged,) = merge_all(flow, parts)
    assert merged.rule == "network"
    assert {node.name for node in merged.nodes} == {"a", "tanh", "b"}


def test_a_part_has_one_output() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.a(x)
        return y, self.b(y)

    flow, parts = parts_of(make(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)))
    assert paths(merge_all(flow, parts)) == [["a"], ["b"]]


# -- by module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 4])
def test_the_layers_of_a_module_are_one_part(length: int) -> None:
    flow, parts = parts_of(with_modules(length, 1))
    merged = merge_modules(flow, parts)
    assert [len(found) for found in paths(merged)] == [length, 1]
    assert (merged[0].rule, merged[0].children) == ("module", [])


def test_a_module_of_many_parts_is_a_sequence() -> None:
    flow, parts = parts_of(with_modules(5, 1))
    assert len(merge_modules(flow, parts)) == 6


def test_the_whole_network_is_no_part() -> None:
    flow, parts = parts_of(nn.Sequential(in_a_row(1, 1)).eval())
    assert len(merge_modules(flow, parts)) == 2


def change_rule(parts: list[Part]) -> None:
    parts[0].rule = "residual"


def change_regions(parts: list[Part]) -> None:
    parts[0].region = parts[1].region = True


def spill_over(parts: list[Part]) -> None:
    parts[1].nodes |= parts[2].nodes
    parts[1].output = parts[2].output
    del parts[2]


@pytest.mark.parametrize("change", [change_rule, change_regions, spill_over])
def test_residuals_regions_and_parts_that_reach_further_stay_apart(
    change: Callable[[list[Part]], None],
) -> None:
    flow, parts = parts_of(with_modules(2, 2, 1))
    change(parts)
    merged = merge_modules(flow, parts)
    assert parts[0] in merged
    assert parts[1] in merged
