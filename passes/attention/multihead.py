"""`nn.MultiheadAttention` as projections, products and a softmax."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.attention.masks import Masks, attend, causal_mask
from passes.infra.base import shape_of, tensor_info
from passes.infra.expansion import Expansion
from passes.infra.meta import copy_meta
from passes.infra.rewrite import Rewriter
from passes.layers.replace import make_linear

__all__ = ["expand_multihead_attention"]


def expand_multihead_attention(
    rewriter: Rewriter, node: fx.Node, module: nn.MultiheadAttention, sites: dict[str, int]
) -> str | None:
    """Make a call of `module` explicit; the reason where that cannot be.

    q, k and v come from three linear layers, have the shapes [N, heads, T, d] (k: [N, heads, d,
    S]), and the layers lie at ``<path>.q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.
    """
    try:
        given = inspect.signature(nn.MultiheadAttention.forward).bind(
            None, *node.args, **node.kwargs
        )
    except TypeError as error:
        return f"its call cannot be bound: {error}"
    given.apply_defaults()
    call: dict[str, Any] = given.arguments
    reason = _why_not(node, module, call, sites)
    if reason:
        return reason
    path = str(node.target)
    layers = _layers(module)
    # The container forgets the packed weights, which nothing reads any more.
    rewriter.set_module(path, nn.Module().eval())
    readers = [user for user in node.users if user.target is operator.getitem]
    wanted: dict[Any, fx.Node] = {user.args[1]: user for user in readers if user.users}
    expansion = Expansion(rewriter, node, path=path, sources=tuple(wanted.values()))
    q, k, v = (
        _heads(expansion, module, f"{name}_proj", layers[name], call[operand], name == "k")
        for name, operand in (("q", "query"), ("k", "key"), ("v", "value"))
    )
    masks = _masks(expansion, module, call)
    mixed, probabilities = attend(
        expansion, q, k, v, scale=float(module.head_dim) ** -0.5, masks=masks
    )
    result = _merge(expansion, module, mixed, call["query"])
    result = expansion.linear("out_proj", layers["out"], result)
    outputs = {0: result}
    if 1 in wanted:
        outputs[1] = probabilities
        if call["average_attn_weights"]:
            outputs[1] = expansion.call(torch.mean, probabilities, dim=(1,), keepdim=False)
    for index, reader in wanted.items():
        copy_meta(reader, outputs[index], "shape")
        rewriter.replace(reader, outputs[index])
    for reader in readers:
        if reader not in wanted.values():
            rewriter.erase(reader)
    rewriter.erase(node)
    return None


def _why_not(
    node: fx.Node, module: nn.MultiheadAttention, call: dict[str, Any], sites: dict[str, int]
) -> str | None:
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} overrides the forward of MultiheadAttention"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    if module.training and module.dropout:
        return "it is in training mode and drops at random"
    if module.bias_k is not None or module.bias_v is not None:
        return "it appends a learned key and value (add_bias_kv)"
    if module.add_zero_attn:
        return "it appends a key and value of zeros (add_zero_attn)"
    if sites[str(node.target)] > 1:
        return f"it is called at {sites[str(node.target)]} places"
    shapes = [shape_of(call[name]) for name in ("query", "key", "value")]
    if any(shape is None for shape in shapes):
        return "the shapes of its inputs are not known"
    if any(len(shape or ()) != 3 for shape in shapes):
        return "its input has no batch dim"
    flags = ("need_weights", "average_attn_weights", "is_causal")
    if any(isinstance(call[name], fx.Node) for name in flags):
        return "its flags are computed while the model runs"
    for user in node.users:
        if user.target is not operator.getitem or user.args[1] not in (0, 1):
            return f"{user.name} reads its outputs as a tuple"
        if user.args[1] == 1 and user.users and not call["need_weights"]:
            return f"{user.name} reads weights that are not computed"
    for name in ("key_padding_mask", "attn_mask"):
        if call[name] is not None and tensor_info(call[name]) is None:
            return f"the type of its {name} is not known"
    return None


def _layers(module: Any) -> dict[str, nn.Linear]:
    """New linear layers with the tensors of `module`; the packed ones are cut into three."""
    if module.in_proj_weight is not None:
        weights = _slices(module.in_proj_weight)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases: tuple[Any, ...] = (None, None, None)
    if module.in_proj_bias is not None:
        biases = _slices(module.in_proj_bias)
    layers = {
        name: make_linear(weight, bias)
        for name, weight, bias in zip(("q", "k", "v"), weights, biases, strict=True)
    }
    layers["out"] = make_linear(module.out_proj.weight, module.out_proj.bias)
    return layers


def _slices(packed: Tensor) -> tuple[Tensor, ...]:
    return torch.chunk(packed, 3)


def _heads(
    expansion: Expansion,
    module: nn.MultiheadAttention,
    name: str,
    layer: nn.Linear,
    x: fx.Node,
    transposed: bool,
) -> fx.Node:
    """The projection of x as [N, heads, T, d]; with `transposed` as [N, heads, d, T]."""
    y = expansion.linear(name, layer, x)
    shape = shape_of(x)
    assert shape is not None
    heads = (module.num_heads, module.head_dim)
    # The batch size is whatever the model is run with; the length is that of the probe.
    if module.batch_first:
        y = expansion.reshape(y, -1, shape[1], *heads)
        batch, length = 0, 1
    else:
        y = expansion.reshape(y, shape[0], -1, *heads)
        batch, length = 1, 0
    return expansion.permute(y, batch, 2, *((3, length) if transposed else (length, 3)))


def _merge(
    expansion: Expansion, module: nn.MultiheadAttention, mixed: fx.Node, query: fx.Node
) -> fx.Node:
    shape = shape_of(query)
    assert shape is not None
    if module.batch_first:
        y = expansion.permute(mixed, 0, 2, 1, 3)
        return expansion.reshape(y, -1, shape[1], module.embed_dim)
    y = expansion.permute(mixed, 2, 0, 1, 3)
    return expansion.reshape(y, shape[0], -1, module.embed_dim)


def _masks(expansion: Expansion, module: nn.MultiheadAttention, call: dict[str, Any]) -> Masks:
    masks = Masks()
    query, key = shape_of(call["query"]), shape_of(call["key"])
    assert query is not None
    assert key is not None
    along = 1 if module.batch_first else 0
    queries, keys = query[along], key[along]
    padding, mask = call["key_padding_mask"], call["attn_mask"]
    if call["is_causal"] and padding is None and not call["need_weights"]:
        # torch takes the flag by its word and does not read the mask.
        masks.allowed.append(causal_mask(queries, keys))
    elif mask is not None:
        flat = len(shape_of(mask) or ()) == 3
        shape = (-1, module.num_heads, queries, keys) if flat else None
        masks.add(expansion, mask, shape=shape, true_hides=True)
    if padding is not None:
        masks.add(expansion, padding, shape=(-1, 1, 1, keys), true_hides=True)
    return masks
