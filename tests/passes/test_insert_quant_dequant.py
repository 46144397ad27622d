from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import FusedLayer, InsertQuantDequant, QuantizerSite
from tests.passes.checking import check
from tests.passes.models import image, make


class Rounding(nn.Module):
    """A quantizer of one's own: the pass knows nothing of bits."""

    detail = "to integers"

    def __init__(self, enabled: bool = False) -> None:
        super().__init__()
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        return x.round() if self.enabled else x


def conv_relu() -> nn.Module:
    return make(lambda self, x: F.relu(self.conv(x)), conv=nn.Conv2d(3, 4, 1))


def test_puts_a_quantizer_behind_a_value() -> None:
    site = QuantizerSite("quantizers.conv", Rounding(), ["conv"])
    check(
        InsertQuantDequant([site], {}),
        conv_relu(),
        image(),
        modified=True,
        expect="""
            x      = input                         f32[1,3,8,8]
            conv   = conv2d(x)                     f32[1,4,8,8]
            conv_q = rounding(conv)    to integers f32[1,4,8,8]
            relu   = relu(conv_q, inplace=False)    f32[1,4,8,8]
            return relu""",
    )


def test_puts_a_quantizer_on_a_weight() -> None:
    quantizer = Rounding()
    found = check(InsertQuantDequant([], {"conv": quantizer}), conv_relu(), image(), modified=True)
    layer = found.graph_module.get_submodule("conv")
    assert isinstance(layer, FusedLayer)
    assert layer.weight_quantizer is quantizer


def test_an_enabled_weight_quantizer_is_used() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)).eval()
    graph_module = fx.symbolic_trace(model)
    InsertQuantDequant([], {"_0": Rounding(enabled=True)}).run(graph_module)
    rounded = F.conv2d(image(), model[0].weight.round())  # type: ignore[arg-type]
    assert torch.equal(graph_module(image()), rounded)


def test_several_values_share_one_quantizer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)

    model = make(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    shared = QuantizerSite("quantizers.a", Rounding(), ["a", "b"])
    found = check(InsertQuantDequant([shared], {}), model, image(), modified=True)
    calls = [n for n in found.graph_module.graph.nodes if n.target == "quantizers.a"]
    assert [call.args[0].name for call in calls] == ["a", "b"]


def test_chosen_users_read_the_value_as_it_is() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        return F.relu(y), torch.sigmoid(y)

    site = QuantizerSite("quantizers.conv", Rounding(enabled=False), ["conv"])
    step = InsertQuantDequant([site], {}, lambda value, user: user.target is F.relu)
    found = check(step, make(forward, conv=nn.Conv2d(3, 4, 1)), image(), modified=True)
    sources = {n.name: n.args[0].name for n in found.graph_module.graph.nodes
               if n.name in ("relu", "sigmoid")}  # fmt: skip
    assert sources == {"relu": "conv_q", "sigmoid": "conv"}


def test_keeps_the_range_that_was_inferred() -> None:
    graph_module = fx.symbolic_trace(conv_relu())
    conv = next(n for n in graph_module.graph.nodes if n.name == "conv")
    conv.meta["range"] = "proof"
    InsertQuantDequant([QuantizerSite("quantizers.conv", Rounding(), ["conv"])], {}).run(
        graph_module
    )
    quantized = next(n for n in graph_module.graph.nodes if n.name == "conv_q")
    assert quantized.meta["range"] == "proof"


def test_declines_where_a_node_is_gone() -> None:
    site = QuantizerSite("quantizers.gone", Rounding(), ["gone"])
    found = check(
        InsertQuantDequant([site], {"lost": Rounding()}), conv_relu(), image(), modified=False
    )
    assert [(d.node, d.reason) for d in found.declines] == [
        ("lost", "is not in the graph"),
        ("gone", "is not in the graph"),
    ]


def test_the_layer_before_stays_as_it_is() -> None:
    model = conv_relu()
    graph_module = fx.symbolic_trace(model)
    graph_module.conv = FusedLayer(graph_module.conv)  # type: ignore[arg-type]
    before = graph_module.conv
    InsertQuantDequant([], {"conv": Rounding()}).run(graph_module)
    assert before.weight_quantizer is None
    assert graph_module.conv is not before
