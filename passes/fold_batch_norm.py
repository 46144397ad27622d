"""Batch norms disappear into the convolutions and linear layers around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from passes.canonicalize import Canonicalize
from passes.infra.base import Decline, Pass, PassResult, tensor_info
from passes.infra.rewrite import Rewriter
from passes.infra.stored import call_sites, is_plain, module_of
from passes.layers.questions import TRANSPOSED, find_layer, only_user, why_not_layer
from passes.layers.replace import with_tensors

__all__ = ["BATCH_NORMS", "FoldBatchNorm", "channel_affine"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Affine(NamedTuple):
    """``y = scale·x + shift`` for each channel, both float64 of shape [C]."""

    scale: Tensor
    shift: Tensor


class FoldBatchNorm(Pass):
    """Fold an eval-mode batch norm into the layer that feeds it, or into the one that reads it.

        before                        after
        y = conv(x, W, b)             z = conv(x, W', b')
        z = bn(y; γ, β, μ, σ²)

    With s = γ/√(σ²+ε) and t = β − μ·s (Ioffe & Szegedy 2015, section 3.1):
    behind a layer   W' = s·W by output channel    b' = s·b + t
    before a layer   W' = W·s by input channel     b' = b + Σ W·t
    Layers are Conv1d/2d/3d, ConvTranspose1d/2d/3d and Linear. The arithmetic is float64 and
    rounds once. The layer becomes a new module with new tensors; the given one is not touched.

    Declines when the layer feeds anything but the batch norm (or the batch norm anything but
    the layer), is called at several places or is not plain; when the batch norm has no running
    statistics; and, before a layer, when zero padding would make the shift differ at the
    borders. `where` picks by the layer's node which layers may take a batch norm in.
    """

    exact = True
    after = (Canonicalize,)

    def __init__(self, where: Callable[[fx.Node], bool] = lambda layer: True) -> None:
        self.where = where

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Fold until nothing folds any more: a folded batch norm may uncover another."""
        rewriter = Rewriter(graph_module)
        allowed = {
            node for node in graph_module.graph.nodes if find_layer(node) and self.where(node)
        }
        sites = call_sites(graph_module.graph)
        while True:
            declines: list[Decline] = []
            folded = False
            for node in list(graph_module.graph.nodes):
                norm = module_of(node)
                if not is_plain(norm, BATCH_NORMS):
                    continue
                reason = _fold(rewriter, node, norm, allowed, sites)
                folded = folded or reason is None
                if reason:
                    declines.append(Decline.at(node, reason))
            if not folded:
                return PassResult(rewriter.finish(), tuple(declines))


def channel_affine(norm: nn.Module) -> Affine:
    """Scale and shift by which an eval-mode batch norm acts on each channel, as float64 [C]."""
    module: Any = norm
    mean, variance = module.running_mean.detach().double(), module.running_var.detach().double()
    scale = torch.rsqrt(variance + module.eps)
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    return Affine(scale, shift)


def _fold(
    rewriter: Rewriter,
    node: fx.Node,
    norm: nn.Module,
    allowed: set[fx.Node],
    sites: dict[str, int],
) -> str | None:
    """Fold one batch norm; the reason where that cannot be."""
    if norm.training:
        return "the batch norm is in training mode"
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return "the batch norm keeps no running statistics"
    feeding = node.args[0] if node.args else None
    behind = _why_not_behind(feeding, node, allowed, sites)
    if behind is None:
        assert isinstance(feeding, fx.Node)
        layer = find_layer(feeding)
        assert layer is not None
        rewriter.set_module(str(feeding.target), _absorb_behind(layer, channel_affine(norm)))
        rewriter.absorb(node, feeding)
        return None
    reading = only_user(node)
    front = _why_not_in_front(reading, node, norm, allowed, sites)
    if front is None:
        assert reading is not None
        layer = find_layer(reading)
        assert layer is not None
        rewriter.set_module(str(reading.target), _absorb_in_front(layer, channel_affine(norm)))
        rewriter.absorb(node, reading, bypass=True)
        return None
    # What reads the batch norm is the reason to give only where a layer stands there.
    if find_layer(feeding) is None and reading is not None and find_layer(reading) is not None:
        return front
    return behind


def _why_not_behind(
    layer_node: Any, node: fx.Node, allowed: set[fx.Node], sites: dict[str, int]
) -> str | None:
    layer = find_layer(layer_node)
    if layer is None:
        name = layer_node.name if isinstance(layer_node, fx.Node) else "nothing"
        return f"fed by {name}, which is no convolution or linear layer"
    if len(layer_node.users) > 1:
        return f"{layer_node.name} feeds {len(layer_node.users)} nodes"
    if isinstance(layer, nn.Linear):
        # Batch norm works on dim 1, a linear layer's features are the last dim.
        info = tensor_info(node)
        if info is None:
            return f"the rank of {layer_node.name} is not known"
        if len(info.shape) != 2:
            return f"normalizes dim 1 of {layer_node.name}, whose features are the last of " + (
                f"{len(info.shape)} dims"
            )
    elif _unbatched(layer, layer_node):
        return f"{layer_node.name} has no batch dim"
    return why_not_layer(layer_node, allowed, sites)


def _why_not_in_front(
    layer_node: Any, node: fx.Node, norm: nn.Module, allowed: set[fx.Node], sites: dict[str, int]
) -> str | None:
    layer = find_layer(layer_node)
    if layer is None:
        return "feeds no convolution or linear layer alone"
    if isinstance(layer, nn.Linear):
        info = tensor_info(node)
        if info is None or len(info.shape) != 2:
            return f"the features of {layer_node.name} are not dim 1"
    elif _unbatched(layer, layer_node):
        return f"{layer_node.name} has no batch dim"
    elif _shift_varies(layer) and bool(channel_affine(norm).shift.any()):
        return f"its shift would differ at the borders of {layer_node.name}, which pads with zeros"
    return why_not_layer(layer_node, allowed, sites)


def _unbatched(layer: Any, layer_node: fx.Node) -> bool:
    info = tensor_info(layer_node)
    return info is not None and len(info.shape) != layer.weight.dim()


def _shift_varies(layer: Any) -> bool:
    """Whether a constant input gives other outputs at the borders than inside."""
    if isinstance(layer, TRANSPOSED):
        # A stride leaves each output another subset of the taps, and borders get fewer of them.
        return (
            set(layer.kernel_size) != {1}
            or set(layer.stride) != {1}
            or set(layer.padding) | set(layer.output_padding) != {0}
        )
    # All the other modes pad with values of the input, which carry the shift themselves.
    return layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)


def _absorb_behind(layer: Any, norm: Affine) -> nn.Module:
    weight = layer.weight.detach().double()
    if isinstance(layer, TRANSPOSED):
        # [I, O/groups, ...]: output channel o is column o % (O/groups) of group o // (O/groups).
        grouped = weight.unflatten(0, (layer.groups, -1))
        scale = norm.scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (grouped * scale).flatten(0, 1)
    else:
        weight = weight * norm.scale.view(-1, *[1] * (weight.dim() - 1))
    bias = norm.shift
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double() * norm.scale
    return with_tensors(layer, weight, bias)


def _absorb_in_front(layer: Any, norm: Affine) -> nn.Module:
    weight = layer.weight.detach().double()
    ones = [1] * (weight.dim() - 2)
    if isinstance(layer, TRANSPOSED):
        by_channel = norm.scale.view(-1, 1, *ones)
        shifts = weight * norm.shift.view(-1, 1, *ones)
        # Sum over the inputs of each group; taps are one tap here, or the shift is zero.
        bias = shifts.unflatten(0, (layer.groups, -1)).sum(dim=1).flatten(0, 1).flatten(1).sum(1)
        weight = weight * by_channel
    elif isinstance(layer, nn.Linear):
        bias = weight @ norm.shift
        weight = weight * norm.scale
    else:
        # [O, I/groups, ...]: group g of the outputs reads channels g·I/groups onwards.
        grouped = weight.unflatten(0, (layer.groups, -1))
        shape = (layer.groups, 1, -1, *ones)
        bias = (grouped * norm.shift.view(shape)).flatten(2).sum(dim=2).flatten()
        weight = (grouped * norm.scale.view(shape)).flatten(0, 1)
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    elif not bool(bias.any()):
        return with_tensors(layer, weight, None)
    return with_tensors(layer, weight, bias)
