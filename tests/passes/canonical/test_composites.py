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


def test_leaves_what_only_resembles_a_channel_shuffle() -> None:
    found = canonical(lambda x: x.view(2, 2, 2, 6, 6).transpose(2, 3).reshape(2, 4, 6, 6))
    assert "channel_shuffle" not in found.operations


@pytest.mark.parametrize(
    ("spelled", "operation"),
    [
        (lambda x: F.relu6(x + 3) / 6, "hardsigmoid"),
        (lambda x: x * F.relu6(x + 3.0) / 6.0, "hardswish"),
        (lambda x: x * (F.hardtanh(3 + x, 0, 6) * (1 / 6)), "hardswish"),
        (lambda x: torch.sigmoid(x) * x, "silu"),
    ],
)
def test_recognizes_gates(spelled: Any, operation: str) -> None:
    assert canonical(spelled).operations == {operation: 1}


def test_leaves_gates_of_other_values() -> None:
    assert "silu" not in canonical(lambda x: x * torch.sigmoid(x + 1)).operations
