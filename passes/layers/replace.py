"""Layers made anew with other tensors: what is given stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from passes.infra.rewrite import Rewriter
from passes.layers.fused_layer import FusedLayer

__all__ = ["bare_layer", "make_linear", "replace_layer", "with_tensors", "without_padding"]


def bare_layer(module: nn.Module) -> nn.Module:
    """The convolution or linear layer within a FusedLayer; any other module itself."""
    return module.layer if isinstance(module, FusedLayer) else module


def replace_layer(rewriter: Rewriter, path: str, layer: nn.Module) -> None:
    """Put `layer` where the bare layer at `path` is; what was fused into that one stays.

    The FusedLayer around it is a new one, because other stages may hold the old one.
    """
    module = rewriter.graph_module.get_submodule(path)
    if isinstance(module, FusedLayer):
        layer = module.with_parts(layer=layer)
    rewriter.set_module(path, layer)


def with_tensors(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of `layer` that holds `weight` and `bias`; `layer` stays as it is.

    Both are cast to the dtype of the weight that they replace.
    """
    old: Any = layer
    dtype = old.weight.dtype
    replaced: dict[int, Any] = {id(old.weight): _parameter(weight, dtype, old.weight)}
    if old.bias is not None:
        replaced[id(old.bias)] = old.bias
    new = copy.deepcopy(layer, replaced)
    new.register_parameter("bias", None if bias is None else _parameter(bias, dtype, old.weight))
    return new


def _parameter(value: Tensor, dtype: torch.dtype, like: Tensor) -> nn.Parameter:
    # A bias that was not touched is already in the right dtype and stays the same tensor.
    if isinstance(value, nn.Parameter) and value.dtype == dtype:
        return value
    return nn.Parameter(value.detach().to(dtype), requires_grad=like.requires_grad)


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer in eval mode that holds these tensors: [O, I] and [O].

    Parameters are taken as they are; slices of them are copied, so that no layer keeps the others'
    memory.
    """
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = _own(weight)
    if bias is not None:
        layer.bias = _own(bias)
    return layer.eval()


def without_padding(convolution: nn.Module) -> nn.Module:
    """A copy of a convolution, on the same tensors, whose input is padded already."""
    old: Any = convolution
    new: Any = copy.deepcopy(old, {id(v): v for v in (old.weight, old.bias) if v is not None})
    new.padding, new.padding_mode = (0,) * len(old.kernel_size), "zeros"
    new._reversed_padding_repeated_twice = [0, 0] * len(old.kernel_size)
    return new  # type: ignore[no-any-return]


def _own(value: Tensor) -> nn.Parameter:
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
