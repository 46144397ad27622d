from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import TraceError
from fxquant.frontend.capture import EXPORT, SYMBOLIC, capture
from fxquant.frontend.inputs import bind
from tests.passes.checking import Function

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution behind a branch on a shape, which symbolic tracing cannot decide."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[2] > 4 else x


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.block(F.relu(self.stem(x)))).mean((2, 3)))


def captured(model: nn.Module, *values: Tensor) -> Any:
    values = values or (IMAGES,)
    return capture(model.eval(), tuple(bind(model, values, "the batch")), values)


def test_what_can_be_traced_symbolically_is() -> None:
    found = captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGES)
    assert (found.front_end, found.notes) == (SYMBOLIC, ())


def test_a_leaf_that_does_much_of_the_work_makes_it_torch_export() -> None:
    found = captured(Network())
    assert (found.front_end, found.leaf_reasons) == (EXPORT, {})
    assert "because block cannot be traced" in found.notes[0]
    assert "branches on the value `x.shape[2] > 4`" in found.notes[0]


def test_a_leaf_that_does_little_stays_a_leaf() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if x.shape[2] > 4 else 1)

    found = captured(nn.Sequential(nn.Conv2d(3, 8, 3), Scale()))
    assert found.front_end == SYMBOLIC
    assert list(found.leaf_reasons) == ["1"]


def test_a_model_without_a_symbolic_trace_is_exported() -> None:
    model = Function(lambda s, x: s.conv(x) if len(x.shape) > 3 and x.shape[3] > 2 else x)
    model.conv = nn.Conv2d(3, 4, 3)
    found = captured(model)
    assert found.front_end == EXPORT
    assert "symbolic tracing fails" in found.notes[0]


def test_what_torch_export_cannot_do_stays_a_leaf_with_both_reasons() -> None:
    class Depends(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > -1e9 else x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Depends())
    found = captured(model)
    assert (found.front_end, list(found.leaf_reasons)) == (SYMBOLIC, ["1"])
    assert "although 1 cannot be traced" in found.notes[0]
    assert "torch.export fails" in found.notes[0]


@torch.fx.wrap
def adds_to(x: Tensor, y: Tensor) -> None:
    x += y


def test_a_wrapped_function_that_writes_is_not_lost() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        adds_to(y, x)
        return y

    model = Function(forward)
    model.conv = nn.Conv2d(3, 3, 3, padding=1)
    found = captured(model)
    assert found.front_end == EXPORT
    assert "adds_to is called for what it writes into its arguments" in found.notes[0]
    torch.testing.assert_close(found.graph_module(IMAGES), model(IMAGES))


def test_a_graph_that_computes_something_else_is_not_taken() -> None:
    class Random(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * torch.rand(()) if x.shape[2] > 4 else x

    found = captured(nn.Sequential(nn.Conv2d(3, 8, 3), Random()))
    assert found.front_end == SYMBOLIC
    assert "computes something else" in found.notes[0]


def test_where_no_front_end_makes_a_graph_the_error_has_both_reasons() -> None:
    model = Function(lambda s, x: x + 1 if x.sum() > 0 else x)
    with pytest.raises(TraceError, match=r"branches on .*; the other front end: torch.export"):
        captured(model)


def test_the_report_says_which_front_end_was_used_and_all_runs_on_integers() -> None:
    q = fxquant.compile(Network().eval(), "w8a8", calibration=[IMAGES], target="reference")
    assert q.report.front_end == EXPORT
    assert q.report.int8_share == 1.0
    assert any("because block cannot be traced" in note for note in q.report.notes)
    assert {row.path for row in q.report.coverage} >= {"stem", "block.conv", "head"}
    assert q(IMAGES[:3]).shape == (3, 4)


def test_an_exported_program_compiles_to_the_same_integers_as_its_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},))
    graphs = [model, program, program.module()]
    outputs = [
        fxquant.compile(g, "w8a8", calibration=[IMAGES], target="reference")(IMAGES[:2])
        for g in graphs
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_selectors_name_modules_of_an_exported_graph() -> None:
    recipe = fxquant.Recipe.named("w8a8").replace({"float": ["block"]})
    q = fxquant.compile(Network().eval(), recipe, calibration=[IMAGES], target="reference")
    rows = {row.path: row.runs_in for row in q.report.coverage}
    assert (rows["block.conv"], rows["stem"]) == ("float", "int8")
