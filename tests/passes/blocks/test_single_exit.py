from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.blocks.flow import data_flow
from passes.blocks.single_exit import find_regions
from tests.passes.models import annotated, image, make

RULES = ("residual", "branches")


def regions(
    forward: Callable[..., Any],
    layers: int,
    *,
    inputs: int = 1,
    forbidden: str = "",
    rules: tuple[str, ...] = RULES,
) -> dict[str, tuple[str, set[str]]]:
    """Rule and members of every region, by its exit; `forward` gets the layers as c[0], c[1]..."""
    model = make(forward, c=nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(layers)))
    flow = data_flow(annotated(model, *[image()] * inputs).graph)
    allowed = [node for node in flow.reads if node.name != forbidden]
    found = find_regions(flow, allowed, rules)
    return {r.exit.name: (r.rule, {node.name for node in r.members}) for r in found}


def shortcut(self: Any, x: Tensor) -> Tensor:
    y = self.c[0](x)
    return torch.relu(torch.add(self.c[1](y), y))


def test_a_region_begins_behind_the_value_that_all_paths_pass() -> None:
    assert regions(shortcut, 2) == {"add": ("residual", {"c_1", "add"})}


def test_what_is_no_addition_is_a_join_of_branches() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([self.c[0](x), x], dim=1)

    assert regions(forward, 1) == {"cat": ("branches", {"c_0", "cat"})}
    assert regions(forward, 1, rules=("residual",)) == {}


def test_a_value_that_is_read_elsewhere_opens_the_region() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.c[0](x)
        return torch.add(y, x), torch.tanh(y)

    assert regions(forward, 1) == {}


def test_all_nodes_of_a_region_must_be_free() -> None:
    assert regions(shortcut, 2, forbidden="c_1") == {}
    assert regions(shortcut, 2, forbidden="add") == {}


def test_two_inputs_that_meet_pass_no_common_value() -> None:
    assert regions(lambda self, x, y: torch.add(self.c[0](x), y), 1, inputs=2) == {}


def test_a_region_without_a_layer_is_none() -> None:
    assert regions(lambda self, x: self.c[0](torch.add(torch.tanh(x), x)), 1) == {}


def test_a_residual_takes_in_branches() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.c[0](x)
        return torch.add(torch.mul(y, self.c[1](y)), x)

    assert regions(forward, 2) == {"add": ("residual", {"c_0", "c_1", "mul", "add"})}


@pytest.mark.parametrize(("inside", "exits"), [(1, {"add_1"}), (2, {"add", "add_1"})])
def test_a_residual_takes_in_one_residual_and_not_two(inside: int, exits: set[str]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x
        for index in range(inside):
            y = torch.add(self.c[index](y), y)
        return torch.add(y, x)

    assert set(regions(forward, inside)) == exits


def test_branches_with_a_residual_inside_are_left_apart() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([torch.add(self.c[0](x), x), x], dim=1)

    assert set(regions(forward, 1)) == {"add"}


@pytest.mark.parametrize(("nested", "layers", "exit"), [
    (False, 13, "add"), (True, 12, "add"), (True, 13, "mul"),
])  # fmt: skip
def test_a_region_of_many_layers_is_left_in_its_parts(nested: bool, layers: int, exit: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.c[0](x)
        y = torch.mul(y, torch.sigmoid(self.c[1](y))) if nested else self.c[1](y)
        for index in range(2, layers):
            y = self.c[index](y)
        return torch.add(y, x)

    assert set(regions(forward, layers)) == {exit}
