from __future__ import annotations

import torch
from torch import fx, nn

from passes import Rewriter, copy_sharing_tensors
from tests.passes.checking import float_graph
from tests.passes.models import image, make


def with_tensors() -> fx.GraphModule:
    model = make(
        lambda self, x: self.bn(self.conv(x)) + self.shift + torch.tensor(2.0),
        conv=nn.Conv2d(3, 3, 1),
        bn=nn.BatchNorm2d(3),
        shift=torch.ones(1),
    )
    return float_graph(model)


def test_a_copy_that_shares_tensors_shares_nothing_else() -> None:
    graph_module = with_tensors()
    copied = copy_sharing_tensors(graph_module)
    assert copied.conv is not graph_module.conv
    assert copied.conv.weight is graph_module.conv.weight
    assert copied.bn.running_mean is graph_module.bn.running_mean
    assert copied.shift is graph_module.shift
    assert copied.graph is not graph_module.graph
    assert copied.graph.owning_module is copied
    assert [node.name for node in copied.graph.nodes] == [
        node.name for node in graph_module.graph.nodes
    ]
    assert torch.equal(copied(image()), graph_module(image()))


def test_a_copy_keeps_meta_apart() -> None:
    graph_module = with_tensors()
    copied = copy_sharing_tensors(graph_module)
    for node in copied.graph.nodes:
        node.meta["origin"] = ("new",)
    assert all(node.meta["origin"] != ("new",) for node in graph_module.graph.nodes)


def test_changing_a_copy_leaves_the_other_as_it_was() -> None:
    graph_module = with_tensors()
    before = graph_module(image())
    copied = copy_sharing_tensors(graph_module)
    rewriter = Rewriter(copied)
    rewriter.set_module("conv", nn.Conv2d(3, 3, 1))
    rewriter.finish()
    assert torch.equal(graph_module(image()), before)


def test_a_hook_of_the_copy_is_none_of_the_original() -> None:
    graph_module = with_tensors()
    copied = copy_sharing_tensors(graph_module)
    copied.conv.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    assert not graph_module.conv._forward_hooks  # type: ignore[union-attr]


def test_modules_that_know_each_other_are_copied_once() -> None:
    graph_module = with_tensors()
    graph_module.conv.add_module("inner", nn.ReLU())  # type: ignore[union-attr,operator]
    graph_module.conv.inner.outer = [graph_module.conv]  # type: ignore[union-attr]
    copied = copy_sharing_tensors(graph_module)
    assert copied.conv.inner.outer[0] is copied.conv  # type: ignore[union-attr,index]
    assert copied.conv is not graph_module.conv


def test_a_recurrent_layer_keeps_its_weights() -> None:
    model = make(lambda self, x: self.lstm(x)[0], lstm=nn.LSTM(8, 4))
    graph_module = float_graph(model)
    copied = copy_sharing_tensors(graph_module)
    x = image()[0]
    assert torch.equal(copied(x), graph_module(x))
    assert copied.lstm.weight_ih_l0 is graph_module.lstm.weight_ih_l0  # type: ignore[union-attr]
