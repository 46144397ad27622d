from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth

from passes.canonicalize import Canonicalize
from passes.eliminate_noops import EliminateNoops
from tests.passes.checking import Checked, Function, check, float_graph


def run(function: Any) -> Checked:
    model = (
        nn.Sequential(function)
        if isinstance(function, nn.Module)
        else Function(lambda _, x: function(x))
    )
    # The ends of the graph are no no-ops, so that what is left shows.
    model = nn.Sequential(nn.Tanh(), model, nn.Sigmoid())
    return check(EliminateNoops(), model, torch.randn(2, 4, 6, 6), first=[Canonicalize()])


NOOPS = {
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
    "dropout in place": nn.Dropout2d(inplace=True),
    "functional dropout": lambda x: F.dropout(x, 0.5, False),
    "torch dropout": lambda x: torch.dropout(x, 0.5, False),
    "stochastic depth": StochasticDepth(0.1, "row"),
    "functional stochastic depth": lambda x: stochastic_depth(x, 0.1, "row", False),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "float": lambda x: x.float(),
    "to dtype": lambda x: x.to(dtype=torch.float32),
    "to memory format": lambda x: x.to(memory_format=torch.channels_last),
    "to other": lambda x: x.to(x),
    "type as": lambda x: x.type_as(x),
    "plus zero": lambda x: 0 + x,
    "times one": lambda x: x * 1.0,
    "over one": lambda x: x / 1,
    "no padding": lambda x: F.pad(x, (0, 0, 0, 0)),
    "zero pad": nn.ZeroPad2d(0),
    "same shape": lambda x: x.view(x.size()),
    "same sizes": lambda x: x.view(x.size(0), 4, -1, x.size(3)),
    "flatten of one dimension": lambda x: x.flatten(1, 1),
    "permutation of nothing": lambda x: x.permute(0, 1, 2, 3),
    "squeeze of a large dimension": lambda x: x.squeeze(1),
    "whole slice": lambda x: x[:, :],
    "ellipsis": lambda x: x[...],
    "window of one": nn.MaxPool2d(1),
    "concatenation of one": lambda x: torch.cat([x], 1),
}


@pytest.mark.parametrize("noop", NOOPS)
def test_erases(noop: str) -> None:
    assert run(NOOPS[noop]).operations == {"tanh": 1, "sigmoid": 1}


KEPT = {
    "strided pooling of one": nn.MaxPool2d(1, 2),
    "another type": lambda x: x.double(),
    "reshape with a fixed batch": lambda x: x.view(2, 4, 6, 6),
    "reshape that mixes": lambda x: x.view(-1, 2, 4, 36),
    "squeeze of the batch": lambda x: x.squeeze(0),
    "new axis": lambda x: x[None],
    "part of a slice": lambda x: x[:, 1:],
    "padding": lambda x: F.pad(x, (0, 1)),
    "plus one": lambda x: x + 1,
    "transposition of equal sizes": lambda x: x.permute(0, 1, 3, 2),
    "rounded division by one": lambda x: torch.div(x, 1, rounding_mode="floor"),
    "pooling of one with its indices": lambda x: F.max_pool2d(x, 1, return_indices=True)[0],
    "average of one over two": lambda x: F.avg_pool2d(x, 1, divisor_override=2),
    "reshape to the batch of another": lambda x: x.view(x[:2].size(0), 4, 6, 6),
}


@pytest.mark.parametrize("kept", KEPT)
def test_keeps(kept: str) -> None:
    assert len(run(KEPT[kept]).operations) > 2


def test_keeps_an_integer_times_a_float() -> None:
    assert run(lambda x: x.long() * 1.0).operations["mul"] == 1


def test_erases_relu_after_relu() -> None:
    model = nn.Sequential(nn.ReLU6(), nn.ReLU())
    found = check(EliminateNoops(), model, torch.randn(1, 3), first=[Canonicalize()])
    assert found.operations == {"relu6": 1}


def test_keeps_dropout_that_always_drops() -> None:
    model = nn.Sequential(nn.Tanh(), Function(lambda _, x: F.dropout(x, 0.0)))
    found = check(EliminateNoops(), model, torch.randn(1, 3), first=[Canonicalize()])
    assert found.operations == {"tanh": 1, "dropout": 1}


def test_may_leave_nothing() -> None:
    check(
        EliminateNoops(),
        nn.Sequential(nn.Dropout(), nn.Identity()),
        torch.randn(1, 3),
        expect="""
            input_1 = input     f32[1,3]
            return input_1""",
        modified=True,
    )


def test_keeps_a_dropout_in_training_mode() -> None:
    graph_module = float_graph(nn.Sequential(nn.Tanh(), nn.Dropout(0.0)))
    graph_module.get_submodule("1").train()
    found = check(EliminateNoops(), graph_module, torch.randn(1, 3), modified=False)
    assert found.operations == {"tanh": 1, "dropout": 1}


class Doubled(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_keeps_what_only_derives_from_identity() -> None:
    graph_module = float_graph(nn.Sequential(nn.Tanh(), nn.Identity()))
    graph_module.set_submodule("1", Doubled())
    check(EliminateNoops(), graph_module, torch.randn(1, 3), modified=False)
