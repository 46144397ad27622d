from __future__ import annotations

from typing import Any

import torch
from torch import nn

from passes import FusedLayer, Rewriter
from passes.layers.replace import bare_layer, make_linear, replace_layer, with_tensors
from tests.passes.checking import float_graph


def test_with_parts_leaves_the_layer_that_is_given_as_it_is() -> None:
    layer = FusedLayer(nn.Linear(2, 3), "relu")
    other = nn.Linear(2, 3)
    new = layer.with_parts(layer=other)
    assert (new.layer, new.activation) == (other, "relu")
    assert layer.layer is not other


def test_with_parts_shares_what_is_not_replaced() -> None:
    layer = FusedLayer(nn.Linear(2, 3))
    new = layer.with_parts(weight_quantizer=(quantizer := nn.Identity()))
    assert (new.layer, new.weight_quantizer) == (layer.layer, quantizer)
    assert layer.weight_quantizer is None


def test_replacing_a_fused_layer_keeps_what_was_fused_into_it() -> None:
    before = FusedLayer(nn.Linear(2, 3), "relu")
    graph_module = float_graph(nn.Sequential(nn.Linear(2, 3)))
    graph_module.set_submodule("0", before)
    replace_layer(Rewriter(graph_module), "0", new := nn.Linear(2, 3))
    found: Any = graph_module.get_submodule("0")
    assert (found.activation, bare_layer(found)) == ("relu", new)
    assert found is not before
    assert before.layer is not new


def test_replacing_a_plain_layer() -> None:
    rewriter = Rewriter(float_graph(nn.Sequential(nn.Linear(2, 3))))
    replace_layer(rewriter, "0", new := nn.Linear(2, 3))
    assert bare_layer(rewriter.graph_module.get_submodule("0")) is new
    assert rewriter.modified


def test_other_tensors_keep_dtype_and_hyper_parameters() -> None:
    layer = nn.Conv2d(2, 2, 3, stride=2).half()
    new = with_tensors(layer, torch.ones(2, 2, 3, 3, dtype=torch.float64), None)
    assert isinstance(new, nn.Conv2d)
    assert (new.stride, new.weight.dtype, new.bias) == ((2, 2), torch.float16, None)
    assert layer.bias is not None


def test_a_linear_layer_of_slices_does_not_keep_the_memory_of_the_whole() -> None:
    packed = torch.randn(6, 4)
    layer = make_linear(packed[:2], None)
    assert torch.equal(layer.weight, packed[:2])
    assert layer.weight.untyped_storage().nbytes() == 2 * 4 * 4
