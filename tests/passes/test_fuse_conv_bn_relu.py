from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import FoldBatchNorm, FuseConvBnRelu, FusedLayer, InsideBlocks
from passes.canonicalize import Canonicalize
from tests.passes.checking import check
from tests.passes.models import annotated, batch_norm, image, make


def conv(**options: Any) -> nn.Module:
    return nn.Conv2d(3, 3, 3, padding=1, **options)


def test_fuses_conv_relu() -> None:
    check(
        FuseConvBnRelu(),
        make(lambda self, x: F.relu(self.conv(x)), conv=conv()),
        image(),
        expect="""
            x = input                 f32[1,3,8,8]
            conv = conv2d_relu(x)     f32[1,3,8,8]
            return conv""",
    )


def test_fuses_conv_bn_relu() -> None:
    model = make(lambda self, x: F.relu(self.bn(self.conv(x))), conv=conv(), bn=batch_norm(3))
    found = check(FuseConvBnRelu(), model, image(), first=[FoldBatchNorm()])
    assert found.operations == {"conv2d_relu": 1}
    (node,) = found.nodes("conv2d_relu")
    assert node.meta["origin"] == ("conv", "bn", "relu")


def test_leaves_a_batch_norm_that_was_not_folded() -> None:
    model = make(lambda self, x: F.relu(self.bn(self.conv(x))), conv=conv(), bn=batch_norm(3))
    found = check(FuseConvBnRelu(), model, image(), modified=False)
    assert found.operations == {"conv2d": 1, "batchnorm2d": 1, "relu": 1}


def test_fuses_relu6() -> None:
    model = make(lambda self, x: F.relu6(self.conv(x)), conv=conv())
    assert check(FuseConvBnRelu(), model, image() * 20).operations == {"conv2d_relu6": 1}


def test_fuses_the_spellings_that_canonicalize_makes_one() -> None:
    model = make(lambda self, x: self.conv(x).clamp_(0, 6), conv=conv())
    found = check(FuseConvBnRelu(), model, image() * 20, first=[Canonicalize()])
    assert found.operations == {"conv2d_relu6": 1}


@pytest.mark.parametrize(
    ("layer", "dims"),
    [
        (nn.Linear(3, 4), 0),
        (nn.Conv1d(3, 4, 3), 1),
        (nn.Conv3d(3, 4, 3), 3),
        (nn.ConvTranspose1d(3, 4, 3), 1),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), 2),
        (nn.ConvTranspose3d(3, 4, 3), 3),
    ],
)
def test_fuses_every_layer_with_relu(layer: nn.Module, dims: int) -> None:
    model = make(lambda self, x: F.relu(self.layer(x)), layer=layer)
    found = check(FuseConvBnRelu(), model, image(size=5, dims=dims))
    assert found.operations == {f"{type(layer).__name__.lower()}_relu": 1}


def test_leaves_a_layer_with_nothing_to_fuse_a_plain_module() -> None:
    model = make(lambda self, x: torch.tanh(self.conv(x)), conv=conv())
    found = check(FuseConvBnRelu(), model, image(), modified=False)
    assert found.graph_module.get_submodule("conv") is model.conv
    assert found.reasons == ()


def test_fuses_conv_add_relu() -> None:
    check(
        FuseConvBnRelu(),
        make(lambda self, x: F.relu(torch.add(self.conv(x), x)), conv=conv()),
        image(),
        expect="""
            x = input                        f32[1,3,8,8]
            conv = conv2d_add_relu(x, x)     f32[1,3,8,8]
            return conv""",
    )


@pytest.mark.parametrize(
    ("activation", "expected"),
    [(None, "conv2d_add"), (F.relu6, "conv2d_add_relu6")],
)
def test_fuses_conv_add_with(activation: Callable[..., Any] | None, expected: str) -> None:
    finish = activation or (lambda x: x)
    model = make(lambda self, x: finish(torch.add(x, self.conv(x))), conv=conv())
    assert check(FuseConvBnRelu(), model, image()).operations == {expected: 1}


def test_leaves_other_activations_behind_the_addition() -> None:
    model = make(lambda self, x: torch.tanh(torch.add(x, self.conv(x))), conv=conv())
    assert check(FuseConvBnRelu(), model, image()).operations == {"conv2d_add": 1, "tanh": 1}


@pytest.mark.parametrize("swapped", [False, True])
def test_the_layer_that_runs_later_takes_the_residual(swapped: bool) -> None:
    def forward(self: Any, x: Any) -> Any:
        early, late = self.early(x), self.late(x)
        return F.relu(torch.add(late, early) if swapped else torch.add(early, late))

    check(
        FuseConvBnRelu(),
        make(forward, early=conv(), late=conv()),
        image(),
        expect="""
            x = input                            f32[1,3,8,8]
            early = conv2d(x)                    f32[1,3,8,8]
            late = conv2d_add_relu(x, early)     f32[1,3,8,8]
            return late""",
    )


def test_the_earlier_layer_takes_the_residual_where_the_later_cannot() -> None:
    def forward(self: Any, x: Any) -> Any:
        early, late = self.early(x), self.late(x)
        return F.relu(torch.add(early, late)), late

    found = check(FuseConvBnRelu(), make(forward, early=conv(), late=conv()), image())
    assert [node.name for node in found.nodes("conv2d_add_relu")] == ["early"]


def test_a_layer_runs_where_the_addition_was() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.conv(x)
        return F.relu(torch.add(y, torch.tanh(x)))

    check(
        FuseConvBnRelu(),
        make(forward, conv=conv()),
        image(),
        expect="""
            x = input                           f32[1,3,8,8]
            tanh = tanh(x)                      f32[1,3,8,8]
            conv = conv2d_add_relu(x, tanh)     f32[1,3,8,8]
            return conv""",
    )


def test_a_residual_may_be_a_fused_layer() -> None:
    def forward(self: Any, x: Any) -> Any:
        return torch.add(F.relu(self.a(x)), self.b(x))

    found = check(FuseConvBnRelu(), make(forward, a=conv(), b=conv()), image())
    assert found.operations == {"conv2d_relu": 1, "conv2d_add": 1}


def test_fuses_a_chain_of_residual_blocks() -> None:
    def forward(self: Any, x: Any) -> Any:
        x = F.relu(torch.add(self.a(x), x))
        x = F.relu(torch.add(self.b(x), x))
        return torch.add(torch.add(self.c(x), x), self.d(x))

    members = {name: conv() for name in "abcd"}
    found = check(FuseConvBnRelu(), make(forward, **members), image())
    assert found.operations == {"conv2d_add_relu": 2, "conv2d_add": 2}


def test_fuses_add_relu() -> None:
    check(
        FuseConvBnRelu(),
        make(lambda self, x: F.relu(torch.add(x, torch.tanh(x)))),
        image(),
        expect="""
            x = input                     f32[1,3,8,8]
            tanh = tanh(x)                f32[1,3,8,8]
            add = add_relu(x, tanh)       f32[1,3,8,8]
            return add""",
    )


def test_without_residual_additions_stay_out_of_layers() -> None:
    model = make(lambda self, x: F.relu(torch.add(self.conv(x), x)), conv=conv())
    found = check(FuseConvBnRelu(residual=False), model, image())
    assert found.operations == {"conv2d": 1, "add_relu": 1}
    assert found.reasons == ()


def test_fused_layers_keep_hyper_parameters_and_wrap_the_module() -> None:
    layer = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1), groups=2)
    found = check(
        FuseConvBnRelu(), make(lambda self, x: F.relu(self.conv(x)), conv=layer), image(4)
    )
    fused = found.graph_module.get_submodule("conv")
    assert isinstance(fused, FusedLayer)
    assert fused.layer is layer
    assert not fused.training


def _same(self: Any, x: Any) -> Any:
    y = self.conv(x)
    return torch.add(y, y)


@pytest.mark.parametrize(
    ("forward", "node", "reason"),
    [
        (lambda self, x: (F.relu(y := self.conv(x)), y), "conv", "conv feeds 2 nodes"),
        (
            lambda self, x: F.relu(self.conv(F.relu(self.conv(x)))),
            "conv",
            "conv is called at 2 places",
        ),
        (lambda self, x: (torch.add(y := self.conv(x), x), y), "add", "conv feeds 2 nodes"),
        (_same, "add", "adds conv to itself"),
        (lambda self, x: torch.add(self.conv(x), x, alpha=2), "add", "alpha is 2"),
        (
            lambda self, x: torch.add(self.conv(x), x.mean((2, 3), keepdim=True)),
            "add",
            "conv and mean differ in shape or dtype",
        ),
        (lambda self, x: torch.add(self.conv(x), self.constant), "add", "constant is a constant"),
        (
            lambda self, x: (F.relu(y := torch.add(x, torch.tanh(x))), y),
            "add",
            "feeds 2 nodes",
        ),
        (lambda self, x: F.relu(torch.add(x, torch.tanh(x), alpha=2)), "add", "alpha is 2"),
    ],
)
def test_declines_with_a_reason(forward: Callable[..., Any], node: str, reason: str) -> None:
    model = make(forward, conv=conv(), constant=torch.ones(1, 3, 8, 8))
    found = check(FuseConvBnRelu(), model, image(), modified=False)
    assert (found.declines[0].node, found.declines[0].reason) == (node, reason)


def test_adding_a_number_is_not_a_residual() -> None:
    model = make(lambda self, x: F.relu(torch.add(self.conv(x), 1.0)), conv=conv())
    assert check(FuseConvBnRelu(), model, image(), modified=False).reasons == ()


def test_what_the_layer_refuses_becomes_add_relu() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.conv(x)
        return F.relu(torch.add(y, x)), y

    found = check(FuseConvBnRelu(), make(forward, conv=conv()), image())
    assert found.operations == {"conv2d": 1, "add_relu": 1}
    assert found.reasons == ("conv feeds 2 nodes",)


def test_declines_residuals_of_unknown_shape() -> None:
    model = make(lambda self, x: torch.add(self.conv(x), x), conv=conv())
    graph_module = annotated(model, image())
    for node in graph_module.graph.nodes:
        node.meta.pop("tensor", None)
    result = FuseConvBnRelu().run(graph_module)
    assert not result.modified
    assert [each.reason for each in result.declines] == ["the shape of conv is not known"]


def test_asks_where() -> None:
    model = make(lambda self, x: F.relu(self.b(F.relu(self.a(x)))), a=conv(), b=conv())
    found = check(FuseConvBnRelu(where=lambda node: node.name == "b"), model, image())
    assert found.operations == {"conv2d": 1, "relu": 1, "conv2d_relu": 1}
    assert found.reasons == ("a was not selected",)


def test_asks_where_about_additions() -> None:
    model = make(lambda self, x: F.relu(torch.add(self.conv(x), x)), conv=conv())
    where = FuseConvBnRelu(where=lambda node: node.name != "add")
    found = check(where, model, image(), modified=False)
    assert found.reasons == ("was not selected", "was not selected")


def test_fuses_inside_blocks_only() -> None:
    def forward(self: Any, x: Any) -> Any:
        x = F.relu(self.stem(x))
        x = F.relu(torch.add(self.b(F.relu(self.a(x))), x))
        return F.relu(self.head(x))

    members = {name: conv() for name in ("stem", "a", "b", "head")}
    check(
        FuseConvBnRelu(where=InsideBlocks()),
        make(forward, **members),
        image(),
        expect="""
            x = input                       f32[1,3,8,8]
            stem = conv2d(x)                f32[1,3,8,8]
            relu = relu(stem, inplace=False)               f32[1,3,8,8]
            a = conv2d_relu(relu)           f32[1,3,8,8]
            b = conv2d_add_relu(a, relu)    f32[1,3,8,8]
            head = conv2d(b)                f32[1,3,8,8]
            relu_3 = relu(head, inplace=False)             f32[1,3,8,8]
            return relu_3""",
    )


def test_an_addition_takes_in_no_relu6() -> None:
    model = make(lambda self, x: F.relu6(torch.add(torch.sin(x), x)))
    check(FuseConvBnRelu(), model, image(), modified=False)


def test_declines_a_layer_that_is_called_by_keyword() -> None:
    model = make(lambda self, x: F.relu(self.conv(input=x)), conv=conv())
    found = check(FuseConvBnRelu(), model, image(), modified=False)
    assert found.reasons == ("conv is not called in canonical form",)
