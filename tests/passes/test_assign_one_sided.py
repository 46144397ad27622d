from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import AssignOneSided, InferRanges, InsertQuantDequant, QuantizerSite
from tests.passes.checking import Checked, check
from tests.passes.models import image, make


class Grid(nn.Module):
    """A quantizer that can be told that its values are never negative."""

    def __init__(self) -> None:
        super().__init__()
        self.one_sided = False

    def make_one_sided(self) -> None:
        self.one_sided = True

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def detail(self) -> str:
        return "one-sided" if self.one_sided else "affine"


def assigned(
    forward: Callable[..., Any], *names: str, modified: bool
) -> tuple[Checked, list[Grid]]:
    grids = [Grid() for _ in names]
    sites = [QuantizerSite(f"q.{n}", grid, [n]) for n, grid in zip(names, grids, strict=True)]
    model = make(forward, conv=nn.Conv2d(3, 4, 3, padding=1))
    first = [InferRanges(), InsertQuantDequant(sites, {})]
    found = check(AssignOneSided(), model, image(), modified=modified, first=first)
    return found, grids


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        F.relu6,
        torch.sigmoid,
        F.hardsigmoid,
        lambda x: F.max_pool2d(F.relu(x), 2),
        lambda x: F.avg_pool2d(F.relu(x), 2),
        lambda x: torch.cat([F.relu(x), torch.sigmoid(x)], 1),
        lambda x: torch.add(F.relu(x), torch.sigmoid(x)),
        lambda x: torch.mul(F.relu(x), torch.sigmoid(x)),
        lambda x: F.relu(x)[:, 1:],
        lambda x: F.pad(F.relu(x), (1, 1)),
        lambda x: F.relu(x).flatten(1),
    ],
)
def test_what_is_never_negative_needs_no_zero_point(function: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return function(self.conv(x))

    from tests.passes.checking import float_graph

    model = make(forward, conv=nn.Conv2d(3, 4, 3))
    last = next(iter(reversed(float_graph(model).graph.nodes))).args[0].name  # type: ignore[union-attr]
    found, (grid,) = assigned(forward, last, modified=True)
    assert grid.one_sided
    assert found.result.notes[0].startswith(f"q.{last}: ")


@pytest.mark.parametrize("function", [torch.tanh, F.hardswish, F.silu, F.leaky_relu, lambda x: -x])
def test_what_may_be_negative_keeps_its_zero_point(function: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return function(F.relu(self.conv(x)) - 1)

    _, (grid,) = assigned(forward, "conv", modified=False)
    assert not grid.one_sided


def test_a_shared_quantizer_needs_all_of_its_values() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), torch.tanh(x)], 1)

    grid = Grid()
    first = [InferRanges(), InsertQuantDequant([QuantizerSite("q", grid, ["relu", "tanh"])], {})]
    check(AssignOneSided(), make(forward), image(), modified=False, first=first)
    assert not grid.one_sided


def test_a_shared_quantizer_of_non_negative_values() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), torch.sigmoid(x)], 1)

    grid = Grid()
    first = [InferRanges(), InsertQuantDequant([QuantizerSite("q", grid, ["relu", "sigmoid"])], {})]
    check(AssignOneSided(), make(forward), image(), modified=True, first=first)
    assert grid.one_sided


def test_the_listing_shows_it() -> None:
    found, _ = assigned(lambda self, x: F.relu(x), "relu", modified=True)
    assert "one-sided" in found.graph_module.get_submodule("q.relu").detail  # type: ignore[operator]


def test_other_modules_are_left_alone() -> None:
    model = make(lambda self, x: F.relu(self.conv(x)), conv=nn.Conv2d(3, 4, 1))
    check(AssignOneSided(), model, image(), modified=False, first=[InferRanges()])
