from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import Canonicalize, FoldConstants, Pass
from passes.infra.pipeline import Pipeline
from tests.passes.checking import Checked, Function, check, float_graph

CANONICAL: tuple[Pass, ...] = (Canonicalize(),)


def fold(function: Callable[..., Any], x: Tensor | None = None, **options: Any) -> Checked:
    x = torch.randn(2, 4, 3) if x is None else x
    parts = {"weight": nn.Parameter(torch.randn(3, 4)), "layer": nn.Linear(4, 3)}
    parts |= options.pop("parts", {})
    return check(FoldConstants(), Function(function, **parts), x, first=CANONICAL, **options)


def test_computes_what_reads_stored_tensors_alone() -> None:
    fold(
        lambda self, x: x + self.weight[:2].permute(1, 0).unsqueeze(0)[:, :, :1],
        expect="""
            x         = input                f32[2,4,3]
            getitem_1 = constant(getitem_1)  f32[1,4,1]
            add       = add(x, getitem_1)    f32[2,4,3]
            return add""",
        modified=True,
    )


def test_keeps_origins_of_what_it_computes() -> None:
    found = fold(lambda self, x: x + torch.exp(self.weight.t()))
    (constant,) = [node for node in found.graph_module.graph.nodes if node.op == "get_attr"]
    assert constant.meta["origin"] == ("exp", "weight", "t")


def test_computes_modules_of_constants() -> None:
    found = fold(lambda self, x: x + F.relu(self.layer(self.weight)).sum())
    assert found.operations == {"add": 1}


def test_keeps_results_apart_from_the_tensors_of_the_model() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    found = fold(lambda self, x: x + self.weight.t(), modified=True, parts={"weight": weight})
    folded = found.graph_module.get_buffer("t")
    assert folded.is_contiguous()
    assert folded.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


def test_forgets_tensors_that_nothing_reads_any_more() -> None:
    found = fold(lambda self, x: x + self.weight.t())
    assert list(found.graph_module.state_dict()) == ["t"]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x + torch.arange(x.size(1), device=x.device).unsqueeze(-1),
        lambda self, x: x @ torch.full((x.shape[2], x.shape[2]), 0.5).triu(1),
    ],
    ids=["arange of a size", "triu of a size"],
)
def test_computes_tensors_made_in_forward(function: Callable[..., Any]) -> None:
    found = fold(function, modified=True)
    assert sum(found.operations.values()) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x + torch.zeros((x.size(0), 4, 3)),
        lambda self, x: x + self.weight.t().unsqueeze(0).expand(x.size(0), -1, -1)[:, :, :1],
    ],
    ids=["zeros", "expand"],
)
def test_keeps_what_depends_on_the_batch_size(function: Callable[..., Any]) -> None:
    found = fold(function)
    other = torch.randn(5, 4, 3)
    assert found.graph_module(other).shape[0] == 5


def test_keeps_sizes_that_hold_the_batch_where_a_layer_has_it_in_dim_1() -> None:
    attention = nn.MultiheadAttention(4, 2)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0] + torch.zeros((x.size(1), 4))

    found = fold(forward, torch.randn(3, 2, 4), parts={"attention": attention})
    assert found.graph_module(torch.randn(3, 5, 4)).shape == (3, 5, 4)


def test_leaves_a_plain_read_of_a_parameter() -> None:
    found = fold(lambda self, x: x @ self.weight, modified=False)
    assert isinstance(found.graph_module.weight, nn.Parameter)


def test_leaves_graphs_without_constants() -> None:
    fold(lambda self, x: self.layer(x.transpose(1, 2)).mean(1), modified=False)


def test_declines_random_values() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + 0 * torch.rand((x.size(2),)).clamp(0, 1)

    found = fold(forward, modified=False)
    assert found.reasons == ("it is random",)


def test_declines_results_that_blow_up_memory() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + torch.zeros((x.size(2) * 6 * 2**20,))[:3] + self.weight.t()

    found = fold(forward, modified=True)
    assert found.reasons == ("its 72 MB would be stored, which is more than it is computed from",)
    assert {"zeros", "getitem"} <= set(found.operations)
    assert "transpose" not in found.operations


def test_leaves_memory_that_nobody_wrote() -> None:
    fold(lambda self, x: x.new_zeros(3) + torch.empty((x.size(2),)) * 0, modified=False)


def test_a_weight_computed_from_constants_gives_a_layer() -> None:
    found = fold(
        lambda self, x: F.linear(x.transpose(1, 2), self.weight / self.weight.norm()),
        modified=True,
    )
    assert found.operations == {"transpose": 1, "linear": 1}
    assert found.nodes("linear")[0].op == "call_module"


def test_result_stands_in_the_module_that_it_belongs_to() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[:3]

    graph_module = float_graph(nn.Sequential(Bias()))
    Pipeline([*CANONICAL, FoldConstants()]).run(graph_module, (torch.randn(2, 3),))
    (constant,) = [node for node in graph_module.graph.nodes if node.op == "get_attr"]
    assert str(constant.target) == "0.getitem"
    assert constant.meta["module_path"] == "0"


def test_leaves_a_layer_in_training_mode_to_the_run() -> None:
    model = Function(lambda self, x: x + self.norm(self.weight), norm=nn.BatchNorm1d(4))
    model.weight = nn.Parameter(torch.randn(3, 4))
    graph_module = float_graph(model)
    graph_module.get_submodule("norm").train()
    found = check(FoldConstants(), graph_module, torch.randn(3, 4), modified=False)
    assert found.operations == {"add": 1, "batchnorm1d": 1}


def test_leaves_what_a_later_call_writes_into_to_the_run() -> None:
    model = Function(
        lambda self, x: torch.mul(self.weight, 2).add_(x), weight=nn.Parameter(torch.randn(3))
    )
    found = check(FoldConstants(), model, torch.randn(3), modified=False)
    assert found.operations == {"mul": 1, ".add_": 1}
