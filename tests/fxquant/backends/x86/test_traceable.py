"""Kernels declare where they are defined whether a trace may hold them."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxquant.backends.x86 import kernels, scripted
from fxquant.backends.x86.traceable import traceable, traced


def call(target: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"),))  # type: ignore[arg-type]


def test_what_declares_nothing_is_not_traced() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x

    assert traced(call(kernel)) is None
    assert traced(call(torch.flip)) is None
    assert traced(call(torch.ops.fxquant.quantize.default)) is None


def test_a_declared_kernel_is_traced_as_it_is() -> None:
    @traceable
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x

    assert traced(call(kernel)) is kernel


def test_a_kernel_may_name_what_stands_for_it() -> None:
    assert traced(call(kernels.codes)) is scripted.codes
    assert traced(call(kernels.conv_add)) is torch.ops.quantized.conv2d_add.default


def test_torch_s_own_calls_are_in_a_table() -> None:
    for target in (operator.getitem, torch.cat, torch.ops.quantized.conv2d.new):
        assert traced(call(target)) is target


def test_of_methods_only_those_that_yield_tensors() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert traced(graph.call_method("dequantize", (x,))) == "dequantize"
    assert traced(graph.call_method("size", (x,))) is None
