from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import FoldBatchNorm
from passes.fold_batch_norm import channel_affine
from passes.infra import verify
from tests.passes.checking import check, float_graph
from tests.passes.models import annotated, batch_norm, image, make


def conv_bn(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return make(lambda self, x: self.bn(self.conv(x)), conv=layer, bn=norm)


def bn_conv(norm: nn.Module, layer: nn.Module) -> nn.Module:
    return make(lambda self, x: self.conv(self.bn(x)), conv=layer, bn=norm)


def test_folds_conv_bn() -> None:
    check(
        FoldBatchNorm(),
        conv_bn(nn.Conv2d(3, 4, 3, padding=1), batch_norm(4)),
        image(),
        expect="""
            x = input            f32[1,3,8,8]
            conv = conv2d(x)     f32[1,4,8,8]
            return conv""",
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_folds_behind_every_convolution(
    dims: int, transposed: bool, groups: int, bias: bool
) -> None:
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(
        4, 6, 3, stride=2, padding=1, groups=groups, bias=bias
    )
    found = check(
        FoldBatchNorm(), conv_bn(layer, batch_norm(6, dims)), image(4, 5, dims=dims), modified=True
    )
    assert len(found.graph_module.graph.nodes) == 3


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_folds_before_every_convolution_without_padding(dims: int, groups: int) -> None:
    layer = getattr(nn, f"Conv{dims}d")(4, 6, 3, stride=2, groups=groups)
    found = check(
        FoldBatchNorm(), bn_conv(batch_norm(4, dims), layer), image(4, 6, dims=dims), modified=True
    )
    assert len(found.graph_module.graph.nodes) == 3


def test_folds_linear_bn() -> None:
    check(
        FoldBatchNorm(), conv_bn(nn.Linear(5, 4), batch_norm(4, 1)), image(5, dims=0), modified=True
    )


def test_folds_bn_linear() -> None:
    check(
        FoldBatchNorm(), bn_conv(batch_norm(5, 1), nn.Linear(5, 4)), image(5, dims=0), modified=True
    )


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.3}])
def test_folds_bn_with(options: dict[str, Any]) -> None:
    model = conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4, **options))
    check(FoldBatchNorm(), model, image(), modified=True)


def test_folds_bn_that_has_a_weight_but_no_bias() -> None:
    norm = batch_norm(4)
    norm.bias = None
    check(FoldBatchNorm(), conv_bn(nn.Conv2d(3, 4, 3), norm), image(), modified=True)


def test_folds_synchronized_batch_norm() -> None:
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(batch_norm(4))
    check(FoldBatchNorm(), conv_bn(nn.Conv2d(3, 4, 3), norm), image(), modified=True)


def test_folds_two_batch_norms_into_one_layer() -> None:
    model = make(
        lambda self, x: self.b(self.a(self.conv(x))),
        conv=nn.Conv2d(3, 4, 3),
        a=batch_norm(4),
        b=batch_norm(4, seed=1),
    )
    assert check(FoldBatchNorm(), model, image()).operations == {"conv2d": 1}


def test_folds_two_batch_norms_in_front_of_a_layer() -> None:
    model = make(
        lambda self, x: self.conv(self.b(self.a(x))),
        conv=nn.Conv2d(3, 4, 3),
        a=batch_norm(3),
        b=batch_norm(3, seed=1),
    )
    assert check(FoldBatchNorm(), model, image()).operations == {"conv2d": 1}


def test_prefers_the_layer_that_feeds() -> None:
    model = make(
        lambda self, x: self.b(self.bn(self.a(x))),
        a=nn.Conv2d(3, 4, 3),
        bn=batch_norm(4),
        b=nn.Conv2d(4, 5, 3, padding=1),
    )
    assert check(FoldBatchNorm(), model, image()).operations == {"conv2d": 2}


def test_folds_in_front_where_the_layer_behind_is_shared() -> None:
    model = make(
        lambda self, x: (y := self.a(x), self.b(self.bn(y)))[1] + y.mean(),
        a=nn.Conv2d(3, 4, 3),
        bn=batch_norm(4),
        b=nn.Conv2d(4, 5, 3),
    )
    assert "batchnorm2d" not in check(FoldBatchNorm(), model, image()).operations


def test_folds_before_zero_padding_where_the_shift_is_zero() -> None:
    norm = batch_norm(3)
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.bias.zero_()
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    found = check(FoldBatchNorm(), bn_conv(norm, layer), image(), modified=True)
    assert found.graph_module.get_submodule("conv").bias is None


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_folds_before_padding_that_repeats_the_input(mode: str) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    check(FoldBatchNorm(), bn_conv(batch_norm(3), layer), image(), modified=True)


@pytest.mark.parametrize("groups", [1, 2])
def test_folds_before_a_pointwise_transposed_convolution(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 1, groups=groups)
    check(FoldBatchNorm(), bn_conv(batch_norm(4), layer), image(4), modified=True)


def test_folds_the_scale_before_any_transposed_convolution() -> None:
    norm = batch_norm(4)
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.bias.zero_()
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    check(FoldBatchNorm(), bn_conv(norm, layer), image(4), modified=True)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ConvTranspose2d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 1, stride=2),
    ],
)
def test_declines_before_a_layer_whose_borders_differ(layer: nn.Module) -> None:
    found = check(FoldBatchNorm(), bn_conv(batch_norm(3), layer), image(), modified=False)
    assert found.reasons == (
        "its shift would differ at the borders of conv, which pads with zeros",
    )


def test_folds_same_padding_of_a_pointwise_convolution() -> None:
    layer = nn.Conv2d(3, 4, 1, padding="same")
    check(FoldBatchNorm(), bn_conv(batch_norm(3), layer), image(), modified=True)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: (self.bn(y := self.conv(x)), y), "conv feeds 2 nodes"),
        (lambda self, x: self.bn(self.conv(x) + self.conv(x)), "fed by add, which is no "),
        (lambda self, x: self.bn(self.conv(self.conv(x))), "conv_1 is called at 2 places"),
        (lambda self, x: self.bn(F.relu(x)), "fed by relu, which is no convolution"),
        (lambda self, x: self.bn(x), "fed by x, which is no convolution or linear layer"),
    ],
)
def test_declines_with_a_reason(forward: Callable[..., Any], reason: str) -> None:
    model = make(forward, conv=nn.Conv2d(3, 3, 1), bn=batch_norm(3))
    found = check(FoldBatchNorm(), model, image(), modified=False)
    assert found.declines[0].node == "bn"
    assert found.reasons[0].startswith(reason)


def test_declines_without_running_statistics() -> None:
    model = conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4, track_running_stats=False))
    found = check(FoldBatchNorm(), model, image(), modified=False)
    assert found.reasons == ("the batch norm keeps no running statistics",)


def test_declines_in_training_mode() -> None:
    graph_module = annotated(conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4)), image())
    graph_module.get_submodule("bn").train()
    result = FoldBatchNorm().run(graph_module)
    assert [decline.reason for decline in result.declines] == ["the batch norm is in training mode"]


def test_declines_a_linear_layer_whose_features_are_not_dim_1() -> None:
    model = conv_bn(nn.Linear(5, 4), batch_norm(4, 1))
    found = check(FoldBatchNorm(), model, torch.randn(2, 4, 5), modified=False)
    assert found.reasons == ("normalizes dim 1 of conv, whose features are the last of 3 dims",)


def test_declines_a_convolution_without_batch_dim() -> None:
    # [C, L] is to the batch norm a batch of C vectors.
    model = conv_bn(nn.Conv1d(3, 4, 1), batch_norm(5, 1))
    found = check(FoldBatchNorm(), model, torch.randn(3, 5), modified=False)
    assert found.reasons == ("conv has no batch dim",)


def test_declines_in_front_of_a_convolution_without_batch_dim() -> None:
    model = bn_conv(batch_norm(4, 1), nn.Conv2d(3, 2, 1))
    found = check(FoldBatchNorm(), annotated(model, torch.randn(3, 4, 5)), torch.randn(3, 4, 5))
    assert found.reasons == ("conv has no batch dim",)


def test_declines_a_linear_layer_of_unknown_rank() -> None:
    result = FoldBatchNorm().run(float_graph(conv_bn(nn.Linear(5, 4), batch_norm(4, 1))))
    assert [decline.reason for decline in result.declines] == ["the rank of conv is not known"]


class DoubledConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class NegatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def test_a_batch_norm_with_a_forward_of_its_own_is_not_folded() -> None:
    graph_module = annotated(conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4)), image())
    graph_module.bn = NegatedNorm(4).eval()
    assert not FoldBatchNorm().run(graph_module).modified


def test_declines_layers_that_do_more_than_their_class() -> None:
    hooked = nn.Conv2d(3, 4, 3)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    early = nn.Conv2d(3, 4, 3)
    early.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    reasons = []
    for layer in (hooked, early, normed, DoubledConv2d(3, 4, 3)):
        graph_module = annotated(conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4)), image())
        graph_module.conv = layer.eval()
        reasons += [decline.reason for decline in FoldBatchNorm().run(graph_module).declines]
    assert reasons == [
        "conv: it has forward hooks",
        "conv: it has forward hooks",
        "conv: its parameters are parametrized",
        "conv: DoubledConv2d overrides the forward of Conv2d",
    ]


def test_asks_where() -> None:
    model = make(
        lambda self, x: self.b(self.conv2(self.a(self.conv1(x)))),
        conv1=nn.Conv2d(3, 4, 3),
        a=batch_norm(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1),
        b=batch_norm(4),
    )
    found = check(FoldBatchNorm(where=lambda node: node.name == "conv2"), model, image())
    assert found.operations == {"conv2d": 2, "batchnorm2d": 1}
    assert found.reasons == ("conv1 was not selected",)


def test_leaves_the_given_modules_alone() -> None:
    model = conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4))
    layer = model.conv
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph_module = annotated(model, image())
    FoldBatchNorm().run(graph_module)
    assert model.conv is layer
    assert graph_module.get_submodule("conv") is not layer
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rounds_once() -> None:
    layer, norm = nn.Conv2d(3, 4, 3), batch_norm(4)
    graph_module = annotated(conv_bn(layer, norm), image())
    FoldBatchNorm().run(graph_module)
    scale, shift = channel_affine(norm)
    folded = graph_module.get_submodule("conv")
    assert torch.equal(folded.weight, (layer.weight.double() * scale.view(4, 1, 1, 1)).float())
    assert torch.equal(folded.bias, (layer.bias.double() * scale + shift).float())


def test_keeps_the_dtype() -> None:
    model = conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4)).double()
    graph_module = annotated(model, image().double())
    FoldBatchNorm().run(graph_module)
    assert graph_module.get_submodule("conv").weight.dtype == torch.float64
    expected = model(image().double())
    verify.check_equivalent(expected, graph_module(image().double()), name="fold")


def test_keeps_where_the_batch_norm_came_from() -> None:
    graph_module = check(
        FoldBatchNorm(), conv_bn(nn.Conv2d(3, 4, 3), batch_norm(4)), image()
    ).graph_module
    (conv,) = graph_module.graph.find_nodes(op="call_module", target="conv")
    assert conv.meta["origin"] == ("conv", "bn")
