from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.canonicalize import Canonicalize
from tests.passes.checking import Checked, Function, check


def canonical(model: nn.Module) -> Checked:
    return check(Canonicalize(), model, torch.randn(2, 4, 6, 6))


def test_functional_convolution_is_a_module() -> None:
    conv = nn.Conv2d(4, 6, 3)
    model = Function(
        lambda self, x: F.conv2d(x, self.weight, self.bias, stride=2, padding=(1, 0)),
        weight=conv.weight,
        bias=conv.bias,
    )
    found = canonical(model)
    assert found.operations == {"conv2d": 1}
    module: Any = found.graph_module.get_submodule("conv2d")
    assert module.stride == (2, 2)
    assert module.padding == (1, 0)
    assert module.weight is conv.weight


def test_functional_layer_takes_the_path_that_its_weights_had() -> None:
    block = nn.Module()
    block.weight = nn.Parameter(torch.randn(3, 6))  # type: ignore[assignment]
    model = Function(lambda self, x: F.linear(x, self.block.weight), block=block)
    (linear,) = canonical(model).nodes("linear")
    assert linear.target == linear.meta["module_path"] == "block"


def test_weights_used_twice_make_two_modules() -> None:
    weight = nn.Parameter(torch.randn(6, 6))
    model = Function(lambda s, x: F.linear(F.linear(x, s.weight), s.weight), weight=weight)
    first, second = canonical(model).nodes("linear")
    assert first.target != second.target


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        (nn.BatchNorm2d(4), lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight, m.bias)),
        (nn.LayerNorm(6), lambda m, x: F.layer_norm(x, (6,), m.weight, m.bias)),
        (nn.GroupNorm(2, 4), lambda m, x: F.group_norm(x, 2, m.weight, m.bias)),
        (
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, groups=2),
        ),
    ],
)
def test_functional_layer_is_a_module(layer: Any, call: Any) -> None:
    parts = {"weight": layer.weight, "bias": layer.bias}
    parts |= {"mean": nn.Parameter(torch.randn(4)), "var": nn.Parameter(torch.rand(4) + 1)}
    found = canonical(Function(call, **parts))
    assert found.operations == {type(layer).__name__.lower(): 1}


def test_declines_computed_weights() -> None:
    model = Function(
        lambda s, x: F.linear(x, s.weight.abs()), weight=nn.Parameter(torch.ones(3, 6))
    )
    assert canonical(model).reasons == ("its weight is computed while the model runs",)
