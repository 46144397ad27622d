from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.canonicalize import Canonicalize
from tests.passes.checking import Checked, Function, check


def canonical(function: Any, **options: Any) -> Checked:
    model = Function(lambda _, x: function(x))
    return check(Canonicalize(), model, torch.randn(2, 4, 6, 6), **options)


def test_recognizes_channel_shuffle() -> None:
    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous()
        return x.view(n, -1, h, w)

    canonical(
        shuffle,
        expect="""
            x      = input                          f32[2,4,6,6]
            view_1 = channel_shuffle(x, groups=2)   f32[2,4,6,6]
            return view_1""",
    )


@pytest.mark.parametrize(
    "shuffle",
    [
        lambda x: x.view(2, 2, 2, 6, 6).permute(0, 2, 1, 3, 4).reshape(2, 4, 6, 6),
        lambda x: x.view(2, 2, 2, 6, 6).transpose(2, 1).flatten(1, 2),
    ],
)
def test_recognizes_other_spellings_of_channel_shuffle(shuffle: Any) -> None:
    assert canonical(shuffle).operations == {"channel_shuffle": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(2, 2, 2, 6, 6).transpose(2, 3).reshape(2, 4, 6, 6),
        lambda x: x.view(2, 2, 2, 6, 6).permute(0, 2, 1, 4, 3).reshape(2, 4, 6, 6),
        lambda x: x.view(2, 2, 12, 2, 3).transpose(1, 2).reshape(2, 4, 6, 6),
        lambda x: x.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 6, 4, 6),
    ],
)
def test_leaves_what_only_resembles_a_channel_shuffle(function: Any) -> None:
    assert "channel_shuffle" not in canonical(function).operations


def test_leaves_a_channel_shuffle_whose_halves_are_read() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.view(2, 2, 2, 6, 6).transpose(1, 2)
        return y.reshape(2, 4, 6, 6), y

    assert "channel_shuffle" not in canonical(function).operations


@pytest.mark.parametrize(
    ("spelled", "operation"),
    [
        (lambda x: F.relu6(x + 3) / 6, "hardsigmoid"),
        (lambda x: x * F.relu6(x + 3.0) / 6.0, "hardswish"),
        (lambda x: x * (F.hardtanh(3 + x, 0, 6) * (1 / 6)), "hardswish"),
        (lambda x: torch.sigmoid(x) * x, "silu"),
        (
            lambda x: x / torch.linalg.vector_norm(x, 2, [1], True).clamp_min(1e-12).expand_as(x),
            "normalize",
        ),
    ],
)
def test_recognizes_compositions(spelled: Any, operation: str) -> None:
    assert canonical(spelled).operations == {operation: 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x + 1),
        lambda x: F.relu6(x + 2) / 6,
        lambda x: F.relu6(x + 3) / 5,
        lambda x: F.relu6(torch.add(x, 3, alpha=2)) / 6,
        lambda x: (x + 1) * F.relu6(x + 3) / 6,
    ],
)
def test_leaves_gates_of_other_values(function: Any) -> None:
    found = canonical(function).operations
    assert not {"silu", "hardsigmoid", "hardswish"} & found.keys()


def test_a_gate_that_is_read_twice_is_computed_anyway() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return x * gate, gate

    assert canonical(function).operations == {"sigmoid": 1, "mul": 1}
