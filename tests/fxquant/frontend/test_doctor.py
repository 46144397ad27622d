from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import TraceError
from fxquant.frontend.trace import trace
from tests.fxquant.tracing import IMAGE, same, targets
from tests.passes.checking import Function


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return self.conv(x)


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.sum() for row in x])


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : int(x.size(1) * 0.5)]


class Lengths(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(x)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.missing  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Branches(), r"branches on the value `x\.mean\(\) > 0`.*torch\.where"),
        (Loops(), r"iterates over the value `x`.*index it"),
        (Numbers(), r"needs the number behind the value `int\(x\.size\(1\) \* 0\.5\)`"),
        (Lengths(), r"takes the length of the value `len\(x\)`.*\.size"),
        (Fails(), r"fails at `return x \+ self\.missing.*AttributeError"),
    ],
)
def test_says_why_the_root_cannot_be_traced(model: nn.Module, problem: str) -> None:
    with pytest.raises(TraceError, match=problem) as raised:
        trace(model.eval())
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{type(model).__name__} cannot be traced: {__file__}:")


def test_a_submodule_that_cannot_be_traced_is_a_leaf() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Branches()), Loops())
    traced = same(model, IMAGE)
    assert targets(traced) == ["0", "1.0", "2"]
    assert set(traced.leaf_reasons) == {"1.0", "2"}
    assert "branches on the value `x.mean() > 0`" in traced.leaf_reasons["1.0"]
    assert "test_doctor.py" in traced.leaf_reasons["1.0"]


def test_only_what_is_a_leaf_in_the_end_has_a_reason() -> None:
    # Loops fails first; its parent then fails on what it gives, and holds it.
    parent = Function(lambda s, x: x + sum(r for r in s.part(x)), part=Loops())
    assert set(same(nn.Sequential(parent), IMAGE).leaf_reasons) == {"0"}


def test_a_leaf_that_is_handed_what_cannot_be_traced_blames_its_caller() -> None:
    class Box:
        def __init__(self, value: Any) -> None:
            self.value = value

    class Opens(nn.Module):
        def forward(self, box: Any) -> Any:
            return box.value if box.value.sum() > 0 else -box.value

    caller = Function(lambda s, x: s.opens(Box(x)), opens=Opens())
    traced = same(nn.Sequential(caller), IMAGE)
    assert set(traced.leaf_reasons) == {"0"}
