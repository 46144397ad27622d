"""Scale migration: where a value can trade range with the linear layers that read it.

    y' = (y + o) / s        W' = W · diag(s)        b' = b − W · o

computes the same in float, channel by channel. y is the output of a LayerNorm, whose γ and β take
up 1/s and o (SmoothQuant: Xiao et al., ICML 2023, equation 3; RepQ-ViT: Li et al., ICCV 2023,
section 3.2), or the values of an attention, whose projection takes up 1/s.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxquant.even_out.channel_walk import ChannelWalk, twice_the_batch
from fxquant.plan.operations import layer_of
from passes import Decline, FusedLayer
from passes.infra.stored import set_module

__all__ = ["Migration", "Reader", "apply_migration", "declined_migrations", "find_migrations"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer and, for each column of its weight, the channel read there.

    Attributes:
        path: of the nn.Linear or FusedLayer.
        columns: int64 [in_features]; -1 where a column reads nothing that may be scaled.
    """

    path: str
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Migration:
    """A value whose channels may be scaled, and who takes up the scale.

    Attributes:
        producer: the path of the LayerNorm (kind "norm") or linear layer (kind "value").
        kind: what the producer is.
        channels: bool [C], which channels may be scaled; the other ones keep s = 1 and o = 0.
        readers: all who read them.
        shiftable: whether o may differ from 0.
    """

    producer: str
    kind: Literal["norm", "value"]
    channels: Tensor
    readers: tuple[Reader, ...]
    shiftable: bool


def find_migrations(fused: fx.GraphModule) -> tuple[Migration, ...]:
    """Every place for a migration in an annotated fused graph, in execution order.

    Kind "norm" is an nn.LayerNorm over the last dimension, with a weight, of whose channels all
    go to linear layers only. Kind "value" is a linear layer of whose channels some go through
    the second operand of torch.matmul to linear layers only; their scale is all that may change.
    """
    return _search(fused)[0]


def declined_migrations(fused: fx.GraphModule) -> tuple[Decline, ...]:
    """The layer norms that cannot migrate, with the reasons."""
    return _search(fused)[1]


def apply_migration(
    fused: fx.GraphModule, migration: Migration, scale: Tensor, shift: Tensor | None = None
) -> None:
    """Let the producer give ``(y + shift) / scale``, and its readers make up for it.

    `scale` (positive) and `shift` are [C]. Layers are replaced, not written into, because stages
    share them; computed in float64 and stored in the layer's own type.

    Raises ValueError for a scale that is not positive and finite, or a shift where none may be.
    """
    ones = torch.ones(len(scale), dtype=torch.float64)
    s = torch.where(migration.channels, scale.double(), ones)
    o = torch.zeros_like(s) if shift is None else shift.double() * migration.channels
    if not bool((s > 0).all() and s.isfinite().all() and o.isfinite().all()):
        raise ValueError(f"{migration.producer}: scales must be positive and finite")
    if bool(o.any()) and not migration.shiftable:
        raise ValueError(f"{migration.producer}: zeros in place of its values forbid a shift")
    producer = _layer(fused, migration.producer)
    weight, bias = producer.weight.detach().double(), _bias(producer, len(s))
    rows = s.view(-1, *([1] * (weight.dim() - 1)))
    shifted = producer.bias is not None or bool(o.any())
    _replace(fused, migration.producer, weight / rows, (bias + o) / s if shifted else None)
    for reader in migration.readers:
        layer = _layer(fused, reader.path)
        weight, bias = layer.weight.detach().double(), _bias(layer, layer.out_features)
        reads = reader.columns >= 0
        index = reader.columns.clamp(min=0)
        columns = torch.where(reads, s[index], torch.ones((), dtype=torch.float64))
        constant = weight @ (o[index] * reads)
        shifted = layer.bias is not None or bool(o.any())
        _replace(fused, reader.path, weight * columns, bias - constant if shifted else None)


# -- the search --------------------------------------------------------------------------


def _search(fused: fx.GraphModule) -> tuple[tuple[Migration, ...], tuple[Decline, ...]]:
    calls = Counter(node.target for node in fused.graph.nodes if node.op == "call_module")
    shapes, numbers = twice_the_batch(fused)
    found, declines = [], []
    for node in fused.graph.nodes:
        if node.op != "call_module" or node not in shapes:
            continue
        module = fused.get_submodule(str(node.target))
        walk = ChannelWalk(fused, shapes, numbers, calls)
        if isinstance(module, nn.LayerNorm):
            reason = _refuse_norm(module, calls[node.target]) or walk.from_norm(node)
            if reason:
                declines.append(Decline.at(node, reason))
                continue
            found.append(_migration(walk, "norm"))
        elif isinstance(layer_of(node, fused), nn.Linear) and calls[node.target] == 1:
            if not _is_bare(node, module):
                continue
            walk.from_value(node)
            if bool(walk.free.any()):
                found.append(_migration(walk, "value"))
    return tuple(found), tuple(declines)


def _migration(walk: ChannelWalk, kind: Literal["norm", "value"]) -> Migration:
    free = walk.free
    readers = []
    for path, columns in walk.readers.items():
        usable = (columns >= 0) & free[columns.clamp(min=0)]
        if bool(usable.any()):
            readers.append(Reader(path, torch.where(usable, columns, -1)))
    return Migration(walk.producer, kind, free, tuple(readers), kind == "norm" and not walk.padded)


def _refuse_norm(module: nn.LayerNorm, calls: int) -> str:
    if calls > 1:
        return "the layer norm is called more than once"
    if len(module.normalized_shape) != 1:
        return "the layer norm goes over more than the last dimension"
    if module.weight is None:
        return "the layer norm has no weight to take up the scale"
    return ""


def _is_bare(node: fx.Node, module: nn.Module) -> bool:
    activation = module.activation if isinstance(module, FusedLayer) else "none"
    return activation == "none" and len(node.all_input_nodes) == 1


# -- the rewrite -------------------------------------------------------------------------


def _layer(root: fx.GraphModule, path: str) -> Any:
    module = root.get_submodule(path)
    return module.layer if isinstance(module, FusedLayer) else module


def _bias(layer: Any, size: int) -> Tensor:
    if layer.bias is None:
        return torch.zeros(size, dtype=torch.float64)
    bias: Tensor = layer.bias.detach().double()
    return bias


def _replace(root: fx.GraphModule, path: str, weight: Tensor, bias: Tensor | None) -> None:
    module = root.get_submodule(path)
    layer = _layer(root, path)
    fresh = copy.copy(layer)
    tensors = {"weight": weight, "bias": bias}
    fresh._parameters = {
        name: None if value is None else nn.Parameter(value.to(layer.weight.dtype), False)
        for name, value in tensors.items()
    }
    if isinstance(module, FusedLayer):
        wrapper = copy.copy(module)
        wrapper._modules = {**module._modules, "layer": fresh}
        fresh = wrapper
    set_module(root, path, fresh)
