"""Layers written as functions of stored weights become the modules that hold them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.infra.base import Decline, tensor_info
from passes.infra.rewrite import Rewriter, get_tensor

__all__ = ["make_layer_modules"]

_WINDOW = {"stride": 1, "padding": 0}
_CONVOLUTION = {**_WINDOW, "dilation": 1, "groups": 1}
_TRANSPOSED = {**_WINDOW, "output_padding": 0, "groups": 1, "dilation": 1}

# Each parameter in its order, with its default; the tensors come first.
_WEIGHTED = {"input": None, "weight": None, "bias": None}
_LAYERS: dict[Any, tuple[str, dict[str, Any]]] = {
    F.linear: ("Linear", _WEIGHTED),
    F.conv1d: ("Conv1d", {**_WEIGHTED, **_CONVOLUTION}),
    F.conv2d: ("Conv2d", {**_WEIGHTED, **_CONVOLUTION}),
    F.conv3d: ("Conv3d", {**_WEIGHTED, **_CONVOLUTION}),
    F.conv_transpose1d: ("ConvTranspose1d", {**_WEIGHTED, **_TRANSPOSED}),
    F.conv_transpose2d: ("ConvTranspose2d", {**_WEIGHTED, **_TRANSPOSED}),
    F.conv_transpose3d: ("ConvTranspose3d", {**_WEIGHTED, **_TRANSPOSED}),
    F.batch_norm: (
        "BatchNorm",
        {
            **{"input": None, "running_mean": None, "running_var": None, "weight": None},
            **{"bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
        },
    ),
    F.layer_norm: (
        "LayerNorm",
        {"input": None, "normalized_shape": None, "weight": None, "bias": None, "eps": 1e-5},
    ),
    F.group_norm: (
        "GroupNorm",
        {"input": None, "num_groups": None, "weight": None, "bias": None, "eps": 1e-5},
    ),
}
_STORED = ("weight", "bias", "running_mean", "running_var")


def make_layer_modules(rewriter: Rewriter) -> tuple[Decline, ...]:
    """Replace calls like ``F.conv2d(x, self.weight)`` by a module; declines say what stays."""
    declines = []
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function" or node.target not in _LAYERS:
            continue
        kind, defaults = _LAYERS[node.target]
        given = {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}
        reason = _why_not(node, given)
        if reason:
            declines.append(Decline.at(node, reason))
            continue
        tensors = {
            name: None if given[name] is None else _stored(rewriter, given[name])
            for name in _STORED
            if name in given
        }
        module = _build(kind, node, given, tensors)
        if module is None:
            declines.append(Decline.at(node, "the rank of its input is not known"))
            continue
        path = _free_path(rewriter, node, given)
        with rewriter.before(node):
            new = rewriter.call_module(path, module, (given["input"],), like=node)
        new.meta["module_path"] = path
        rewriter.replace(node, new)
    return tuple(declines)


def _why_not(node: fx.Node, given: dict[str, Any]) -> str:
    for name in _STORED:
        value = given.get(name)
        if isinstance(value, fx.Node) and value.op != "get_attr":
            return f"its {name} is computed while the model runs"
    if given.get("weight") is None and node.target not in (F.batch_norm, F.layer_norm):
        return "" if node.target is F.group_norm else "it has no stored weight"
    if node.target is F.batch_norm and (given["training"] or given["running_mean"] is None):
        return "it normalizes by the statistics of the batch"
    values = [value for name, value in given.items() if name not in (*_STORED, "input")]
    nodes: list[fx.Node] = []
    fx.map_arg(values, nodes.append)
    return "its parameters are computed while the model runs" if nodes else ""


def _stored(rewriter: Rewriter, node: fx.Node) -> Tensor:
    return get_tensor(rewriter.graph_module, str(node.target))


def _build(
    kind: str, node: fx.Node, given: dict[str, Any], tensors: dict[str, Tensor | None]
) -> nn.Module | None:
    """A module of `torch.nn` that holds `tensors`, without ever allocating others."""
    options: dict[str, Any] = {"device": "meta"}
    weight: Any = tensors.get("weight")
    bias = tensors.get("bias") is not None
    module: Any
    if kind == "Linear":
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, **options)
    elif kind.startswith("Conv"):
        options |= {name: _plain(given[name]) for name in _CONVOLUTION}
        transposed = kind.startswith("ConvTranspose")
        if transposed:
            options["output_padding"] = _plain(given["output_padding"])
        inner, outer = (0, 1) if transposed else (1, 0)
        channels = [0, 0]
        channels[inner if not transposed else 0] = 0
        in_channels = weight.shape[0] if transposed else weight.shape[1] * given["groups"]
        out_channels = weight.shape[1] * given["groups"] if transposed else weight.shape[0]
        window = tuple(weight.shape[2:])
        module = getattr(nn, kind)(in_channels, out_channels, window, bias=bias, **options)
    elif kind == "BatchNorm":
        info = tensor_info(given["input"])
        axes = {2: 1, 3: 1, 4: 2, 5: 3}.get(len(info.shape)) if info is not None else None
        if axes is None:
            return None
        mean: Any = tensors["running_mean"]
        affine = weight is not None or bias
        options |= {"eps": given["eps"], "momentum": given["momentum"], "affine": affine}
        module = getattr(nn, f"BatchNorm{axes}d")(mean.numel(), **options)
        module.num_batches_tracked = None
    elif kind == "LayerNorm":
        options |= {"eps": given["eps"], "elementwise_affine": weight is not None, "bias": bias}
        module = nn.LayerNorm(list(given["normalized_shape"]), **options)
    else:
        info = tensor_info(given["input"])
        if info is None:
            return None
        options |= {"eps": given["eps"], "affine": weight is not None}
        module = nn.GroupNorm(given["num_groups"], info.shape[1], **options)
    for name, tensor in tensors.items():
        if name.startswith("running"):
            setattr(module, name, tensor)
        else:
            setattr(module, name, _parameter(tensor))
    return module.eval()
