"""Neighbouring layers trade scale and compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fxquant.even_out.equalize import Equalize
from passes import Canonicalize, FuseConvBnRelu, PassRecord, Pipeline, copy_sharing_tensors
from tests.fxquant.small_networks import images, module
from tests.passes.checking import check, float_graph


def fused(model: nn.Module) -> fx.GraphModule:
    graph_module = float_graph(model)
    Pipeline([Canonicalize(), FuseConvBnRelu()]).run(graph_module, (images(1),))
    return copy_sharing_tensors(graph_module)


def equalized(graph_module: fx.GraphModule) -> PassRecord:
    (record,) = Pipeline([Equalize()]).run(graph_module, (images(1),))
    return record


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
    record = equalized(graph_module)
    assert record.verified == "same outputs"
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
    equalized(fused(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_keeps_what_every_pass_promises() -> None:
    checked = check(Equalize(), fused(uneven(*CHAINS["depthwise"]())), images(1), modified=True)
    assert checked.result.notes == ("cross-layer equalization: 2 pairs of layers",)


def test_what_has_settled_stays_as_it_is() -> None:
    layers = [nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(8))]
    check(Equalize(), fused(uneven(*layers)), images(1), modified=True)


def test_the_diff_says_what_happened_to_each_layer() -> None:
    record = equalized(fused(uneven(*CHAINS["depthwise"]())))
    first, middle, last = record.diff.splitlines()
    assert first.startswith("~ 0: outputs divided by ")
    assert "outputs divided by" in middle
    assert "columns times" in middle
    assert last.startswith("~ 4: columns times ")


def test_layers_that_are_alike_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    for layer in model:
        nn.init.ones_(layer.weight)  # type: ignore[arg-type]
    assert not equalized(fused(model)).modified


def declined(model: nn.Module) -> list[str]:
    record = equalized(fused(model))
    assert not record.modified
    return [decline.reason for decline in record.declines]


def test_relu6_declines() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()
    assert declined(model) == ["relu6 is not scale-equivariant"]


def test_a_layer_that_is_called_twice_declines() -> None:
    model = module(
        lambda self, x: self.b(self.b(self.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)
    )
    assert declined(model) == ["b is called more than once", "b is called more than once"]


def test_a_value_that_two_layers_read_declines() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.a(x)
        return self.b(y) + self.c(y)

    parts = {name: nn.Conv2d(inner, 4, 1) for name, inner in (("a", 3), ("b", 4), ("c", 4))}
    assert declined(module(forward, **parts)) == ["feeds 2 nodes", "c also adds a residual"]


def test_a_value_that_is_input_and_residual_of_one_layer_keeps_its_scale() -> None:
    model = module(
        lambda self, x: (y := self.a(x)) + self.b(y), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)
    )
    assert declined(model) == ["b also adds a residual"]
