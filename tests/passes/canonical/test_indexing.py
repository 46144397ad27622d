from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes import Canonicalize
from passes.infra.listing import to_text
from tests.passes.checking import Function, check


def test_what_unbind_gives_is_indexed() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        q, k, v = x.unbind(1)
        return (q + k) * v

    check(
        Canonicalize(),
        Function(forward),
        torch.randn(2, 3, 4),
        modified=True,
        expect="""
            x         = input                   f32[2,3,4]
            getitem   = getitem(x, (:, 0))      f32[2,4]
            getitem_1 = getitem(x, (:, 1))      f32[2,4]
            getitem_2 = getitem(x, (:, 2))      f32[2,4]
            add       = add(getitem, getitem_1) f32[2,4]
            mul       = mul(add, getitem_2)     f32[2,4]
            return mul""",
    )


@pytest.mark.parametrize(
    ("function", "listing"),
    [
        (lambda s, x: x.select(-1, 2), "getitem(x, (:, :, 2))"),
        (lambda s, x: x.narrow(1, 1, 2), "getitem(x, (:, 1:3))"),
        (lambda s, x: x.unbind()[1], "getitem(x, 1)"),
    ],
)
def test_selected_items_are_indexed(function: object, listing: str) -> None:
    found = check(Canonicalize(), Function(function), torch.randn(2, 3, 4))  # type: ignore[arg-type]
    assert found.operations == {"getitem": 1}
    assert listing in to_text(found.graph_module)


def test_an_unbound_value_that_is_read_as_a_whole_stays() -> None:
    found = check(
        Canonicalize(), Function(lambda s, x: torch.stack(x.unbind(1), 2)), torch.randn(2, 3, 4)
    )
    assert "unbind" in found.operations
