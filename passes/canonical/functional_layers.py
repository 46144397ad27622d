"""Layers written as functions of stored weights become the modules that hold them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.infra.base import Decline, tensor_info
from passes.infra.rewrite import Rewriter
from passes.infra.stored import free_path, get_tensor

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
        dict.fromkeys(("input", "running_mean", "running_var", "weight", "bias"))
        | {"training": False, "momentum": 0.1, "eps": 1e-5},
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
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_Tensors = dict[str, Tensor | None]
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
        module = _build(kind, given, tensors)
        if module is None:
            declines.append(Decline.at(node, "the shape of its input is not known"))
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


def _build(kind: str, given: dict[str, Any], tensors: _Tensors) -> nn.Module | None:
    """A module of `torch.nn` that holds `tensors`; None where the shape that it needs is unknown.

    It is made on the meta device: no memory is filled with weights that nobody reads.
    """
    with torch.device("meta"):
        module = _empty(kind, given, tensors)
    if module is None:
        return None
    for name, tensor in tensors.items():
        if not name.startswith("running"):
            parameter = isinstance(tensor, nn.Parameter) or tensor is None
            held = tensor if parameter else nn.Parameter(cast(Tensor, tensor), requires_grad=False)
            module.register_parameter(name, cast("nn.Parameter | None", held))
        else:
            module.register_buffer(name, tensor)
    if kind == "BatchNorm":
        module.register_buffer("num_batches_tracked", None)
    return module.eval()


def _empty(kind: str, given: dict[str, Any], tensors: _Tensors) -> nn.Module | None:
    weight, bias = tensors["weight"], tensors["bias"] is not None
    info = tensor_info(given["input"])
    rank = len(info.shape) if info is not None else 0
    if kind == "LayerNorm":
        return nn.LayerNorm(list(given["normalized_shape"]), given["eps"], bias=bias)
    if kind == "GroupNorm":
        groups, eps = given["num_groups"], given["eps"]
        return nn.GroupNorm(groups, info.shape[1], eps) if info is not None else None
    if kind == "BatchNorm":
        norm = _BATCH_NORMS.get(rank)
        mean = cast(Tensor, tensors["running_mean"])
        return norm(mean.numel(), given["eps"], given["momentum"]) if norm is not None else None
    assert weight is not None
    if kind == "Linear":
        return nn.Linear(weight.shape[1], weight.shape[0], bias)
    # A convolution's weight is [out, in / groups, ...], a transposed one's [in, out / groups, ...].
    channels = [weight.shape[0], weight.shape[1] * given["groups"]]
    if not kind.startswith("ConvTranspose"):
        channels.reverse()
    names = [name for name in _TRANSPOSED if name in given]
    options = {name: _plain(given[name]) for name in names}
    module: nn.Module = getattr(nn, kind)(*channels, tuple(weight.shape[2:]), bias=bias, **options)
    return module


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _free_path(rewriter: Rewriter, node: fx.Node, given: dict[str, Any]) -> str:
    """Where the module goes: the module that the weights were in, or beside it."""
    source = given["weight"] if given["weight"] is not None else given.get("running_mean")
    owner, _, leaf = str(source.target).rpartition(".") if source is not None else ("", "", "")
    root = rewriter.graph_module
    if owner and leaf in ("weight", "running_mean") and _holds_only(rewriter, owner, node):
        return owner
    base = f"{owner}.{node.name}" if owner and not owner.startswith(node.name) else node.name
    return free_path(root, base)


def _holds_only(rewriter: Rewriter, owner: str, node: fx.Node) -> bool:
    """Whether nothing but the weights of `node` is read from below `owner`."""
    for other in rewriter.graph.nodes:
        inside = str(other.target) == owner or str(other.target).startswith(f"{owner}.")
        if other.op == "call_module" and inside:
            return False
        if other.op == "get_attr" and inside and any(user is not node for user in other.users):
            return False
    return True
