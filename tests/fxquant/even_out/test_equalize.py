"""Neighbouring layers trade scale and compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.even_out.equalize import equalizable_pairs, equalize
from passes import Canonicalize, FuseConvBnRelu, Pipeline, copy_sharing_tensors
from tests.fxquant.small_networks import images, module
from tests.passes.checking import float_graph


def fused(model: nn.Module) -> fx.GraphModule:
    graph_module = float_graph(model)
    Pipeline([Canonicalize(), FuseConvBnRelu()]).run(graph_module, (images(1),))
    return copy_sharing_tensors(graph_module)


def uneven(*layers: Any) -> nn.Sequential:
    model = nn.Sequential(*layers).eval()
    first: Any = model[0]
    first.weight.data *= torch.logspace(-2, 2, first.out_channels).view(-1, 1, 1, 1)
    return model


CHAINS: dict[str, Any] = {
    "relu": lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)],
    "nothing between": lambda: [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)],
    "depthwise": lambda: [
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1),
    ],
    "grouped": lambda: [nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)],
    "a dead channel": lambda: [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_computes_the_same_with_weights_of_like_range(name: str) -> None:
    model = uneven(*CHAINS[name]())
    if name == "a dead channel":
        model[0].weight.data[2] = 0.0
    graph_module = fused(model)
    expected = model(images())
    equalize(graph_module)
    assert torch.allclose(
        graph_module(images()), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    first: Any = graph_module.get_submodule("0")
    weight = getattr(first, "layer", first).weight.abs().flatten(1).amax(1)
    weight = weight[weight > 0]
    assert weight.max() / weight.min() < 1e3


def test_the_model_keeps_its_weights() -> None:
    model = uneven(*CHAINS["relu"]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    equalize(fused(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_relu6_ends_a_chain() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()
    assert equalizable_pairs(fused(model)) == []


def test_a_value_that_two_layers_read_ends_a_chain() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.a(x)
        return self.b(y) + self.c(y)

    parts = {name: nn.Conv2d(inner, 4, 1) for name, inner in (("a", 3), ("b", 4), ("c", 4))}
    assert equalizable_pairs(fused(module(forward, **parts))) == []
