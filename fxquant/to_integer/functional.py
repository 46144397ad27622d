"""Float modules as calls of torch functions on named constants.

An artefact holds functions and tensors and no code: a module that is listed here can be saved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["Functional", "functional", "pair"]

Constant = Callable[[str], "fx.Node | None"]
Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], fx.Node]
Functional = Callable[[Any, Constant, Call, tuple[Any, ...], dict[str, Any]], fx.Node]
"""Called as ``f(module, constant, call, args, kwargs)``: `constant` reads one of the module's
tensors by name, `call` creates a function call; the result stands for the module's."""


def functional(module: nn.Module) -> Functional | None:
    """What calls functions instead of exactly this type of module, or None."""
    return _FUNCTIONALS.get(type(module))


def _optional(module: Any, constant: Constant, name: str) -> fx.Node | None:
    return None if getattr(module, name, None) is None else constant(name)


def _linear(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    return call(F.linear, (*args, constant("weight"), _optional(module, constant, "bias")), {})


def _convolution(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    dimensions = len(module.kernel_size)
    x = args[0]
    padding = module.padding
    if module.padding_mode != "zeros":
        pads = list(module._reversed_padding_repeated_twice)
        x = call(F.pad, (x, pads), {"mode": module.padding_mode})
        padding = (0,) * dimensions
    return call(
        getattr(F, f"conv{dimensions}d"),
        (
            x,
            constant("weight"),
            _optional(module, constant, "bias"),
            module.stride,
            padding,
            module.dilation,
            module.groups,
        ),
        {},
    )


def _transposed(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    return call(
        getattr(F, f"conv_transpose{len(module.kernel_size)}d"),
        (
            args[0],
            constant("weight"),
            _optional(module, constant, "bias"),
            module.stride,
            module.padding,
            module.output_padding,
            module.groups,
            module.dilation,
        ),
        {},
    )


def _batch_norm(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    return call(
        F.batch_norm,
        (
            args[0],
            _optional(module, constant, "running_mean"),
            _optional(module, constant, "running_var"),
            _optional(module, constant, "weight"),
            _optional(module, constant, "bias"),
        ),
        {"training": module.running_mean is None, "momentum": 0.0, "eps": module.eps},
    )


def _layer_norm(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    weight, bias = (_optional(module, constant, name) for name in ("weight", "bias"))
    return call(
        F.layer_norm, (args[0], tuple(module.normalized_shape), weight, bias, module.eps), {}
    )


def _group_norm(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    weight, bias = (_optional(module, constant, name) for name in ("weight", "bias"))
    return call(F.group_norm, (args[0], module.num_groups, weight, bias, module.eps), {})


def _instance_norm(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = (_optional(module, constant, name) for name in names)
    of_input = module.running_mean is None
    return call(F.instance_norm, (args[0], *tensors, of_input, 0.0, module.eps), {})


def _prelu(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    return call(F.prelu, (args[0], constant("weight")), {})


def _embedding(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    return call(F.embedding, (args[0], constant("weight")), {})


def _attention(module: Any, constant: Constant, call: Call, args: Any, kwargs: Any) -> fx.Node:
    """nn.MultiheadAttention; the pair of output and weights, as the module returns it."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if module.batch_first:
        query, key, value = (call(torch.transpose, (x, 0, 1), {}) for x in (query, key, value))
    separate = not module._qkv_same_embed_dim
    options: dict[str, Any] = {
        "training": False,
        "key_padding_mask": given.get("key_padding_mask"),
        "need_weights": given.get("need_weights", True),
        "attn_mask": given.get("attn_mask"),
        "average_attn_weights": given.get("average_attn_weights", True),
        "is_causal": given.get("is_causal", False),
        "use_separate_proj_weight": separate,
    }
    if separate:
        options |= {f"{letter}_proj_weight": constant(f"{letter}_proj_weight") for letter in "qkv"}
    result = call(
        F.multi_head_attention_forward,
        (
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            None if separate else constant("in_proj_weight"),
            _optional(module, constant, "in_proj_bias"),
            _optional(module, constant, "bias_k"),
            _optional(module, constant, "bias_v"),
            module.add_zero_attn,
            0.0,
            constant("out_proj.weight"),
            None if module.out_proj.bias is None else constant("out_proj.bias"),
        ),
        options,
    )
    if not module.batch_first:
        return result
    output = call(operator.getitem, (result, 0), {})
    weights = call(operator.getitem, (result, 1), {})
    return call(pair, (call(torch.transpose, (output, 0, 1), {}), weights), {})


def pair(first: Any, second: Any) -> tuple[Any, Any]:
    """A tuple, made by a node of the graph."""
    return first, second


_FUNCTIONALS: dict[type[nn.Module], Functional] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    nn.ConvTranspose3d: _transposed,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.MultiheadAttention: _attention,
}
