from __future__ import annotations

import pytest
from torch import Tensor, nn

from passes.infra.stored import free_path, get_tensor, is_plain, set_module
from tests.passes.models import make


def test_get_tensor_refuses_what_is_no_tensor() -> None:
    with pytest.raises(AttributeError, match=r"conv\.bias is a NoneType, not a tensor"):
        get_tensor(make(lambda self, x: x, conv=nn.Conv2d(1, 1, 1, bias=False)), "conv.bias")


def test_set_module_replaces_in_place() -> None:
    root = nn.Sequential(nn.ReLU(), nn.Tanh())
    set_module(root, "0", nn.Sigmoid())
    assert [type(child) for child in root] == [nn.Sigmoid, nn.Tanh]


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Named(nn.Conv2d):
    pass


def test_a_module_with_a_forward_of_its_own_is_not_plain() -> None:
    hooked, replaced = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    modules = [nn.Conv2d(1, 1, 1), Named(1, 1, 1), Doubled(1, 1, 1), hooked, replaced]
    assert [is_plain(each, nn.Conv2d) for each in modules] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("path", "suffixed", "expected"),
    [("c", False, "c"), ("a", False, "a_2"), ("a", True, "a_2"), ("c", True, "c_1")],
)
def test_a_free_path_is_one_where_nothing_is(path: str, suffixed: bool, expected: str) -> None:
    root = nn.Module()
    root.a, root.a_1 = nn.ReLU(), nn.ReLU()
    assert free_path(root, path, suffixed=suffixed) == expected
