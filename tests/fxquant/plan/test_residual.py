"""Which additions make up a transformer's residual stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.plan.residual import ResidualStream
from passes import Canonicalize, Pipeline
from tests.fxquant.small_networks import module
from tests.passes.checking import float_graph


def stream(model: nn.Module, x: Tensor) -> tuple[set[str], set[str]]:
    graph_module = float_graph(model)
    Pipeline([Canonicalize()]).run(graph_module, (x,))
    found = ResidualStream(graph_module)
    return {node.name for node in found.additions}, {node.name for node in found.values}


def tokens() -> Tensor:
    return torch.randn(1, 5, 4)


def test_an_addition_of_what_a_linear_layer_makes_is_in_the_stream() -> None:
    model = module(
        lambda self, x: x + self.fc(self.norm(x)), norm=nn.LayerNorm(4), fc=nn.Linear(4, 4)
    )
    assert stream(model, tokens()) == ({"add"}, {"add", "x", "fc"})


def test_the_position_embedding_in_front_of_a_block_is_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.position
        return x + self.fc(x)

    model = module(forward, fc=nn.Linear(4, 4))
    model.position = nn.Parameter(torch.randn(1, 5, 4))
    additions, values = stream(model, tokens())
    assert additions == {"add", "add_1"}
    assert "position" in values


def test_a_layer_scale_between_is_part_of_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.scale * self.fc(x)

    model = module(forward, fc=nn.Linear(4, 4))
    model.scale = nn.Parameter(torch.randn(4))
    assert stream(model, tokens()) == ({"add"}, {"add", "mul", "x"})


def test_the_bias_of_attention_scores_is_not() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return F.softmax(q @ k.transpose(1, 2) + self.bias, -1)

    model = module(forward, q=nn.Linear(4, 4), k=nn.Linear(4, 4))
    model.bias = nn.Parameter(torch.randn(5, 5))
    assert stream(model, tokens()) == (set(), set())


def test_residual_blocks_of_convolutions_have_none() -> None:
    model = module(lambda self, x: x + self.conv(x), conv=nn.Conv2d(3, 3, 1))
    assert stream(model, torch.randn(1, 3, 4, 4)) == (set(), set())
