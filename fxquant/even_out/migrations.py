"""Scale migration: where a layer norm can trade range with the linear layers that read it.

    y' = (y + o) / s        W' = W · diag(s)        b' = b − W · o

computes the same in float, channel by channel. γ and β of the LayerNorm take up 1/s and o
(SmoothQuant: Xiao et al., ICML 2023, equation 3; RepQ-ViT: Li et al., ICCV 2023, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.even_out.channel_walk import ChannelWalk, twice_the_batch
from fxquant.even_out.layers import describe_change, layer_at, replace_tensors
from passes import Decline, Rewriter

__all__ = ["SMALLEST", "Migration", "apply_migration", "find_migrations", "floored"]

SMALLEST = 2.0**-8
"""Of the mean scale: what lies below loses float precision and gains nothing."""


@dataclass(frozen=True, eq=False)
class Migration:
    """A LayerNorm whose channels may be scaled, and who takes up the scale.

    Attributes:
        node: its call.
        path: of the LayerNorm.
        readers: for each linear layer that reads it, by path, the channel that each column of its
            weight reads, int64 [in_features]; -1 where a column reads zeros of a padding.
        shiftable: whether o may differ from 0.
    """

    node: fx.Node
    path: str
    readers: dict[str, Tensor]
    shiftable: bool


def find_migrations(fused: fx.GraphModule) -> tuple[list[Migration], list[Decline]]:
    """Every layer norm of an annotated fused graph that can migrate, and why others cannot.

    That is an nn.LayerNorm over the last dimension, with a weight, of whose channels all go to
    linear layers only.
    """
    calls = Counter(node.target for node in fused.graph.nodes if node.op == "call_module")
    found: list[Migration] = []
    declines: list[Decline] = []
    norms = [node for node in fused.graph.nodes if _is_norm(node, fused)]
    shapes, numbers = twice_the_batch(fused) if norms else ({}, {})
    for node in norms:
        if node not in shapes:
            continue
        module: Any = fused.get_submodule(str(node.target))
        walk = ChannelWalk(fused, shapes, numbers, calls)
        reason = _refuse(module, calls[node.target]) or walk.from_norm(node)
        if reason:
            declines.append(Decline.at(node, reason))
        else:
            found.append(Migration(node, walk.producer, walk.readers, not walk.padded))
    return found, declines


def apply_migration(
    rewriter: Rewriter, migration: Migration, scale: Tensor, shift: Tensor | None = None
) -> list[str]:
    """Let the norm give ``(y + shift) / scale``, and its readers make up for it.

    `scale` (positive) and `shift` are [C]. Computed in float64 and stored in the layer's own
    type. Returns a line for each layer that changed.

    Raises ValueError for a scale that is not positive and finite, or a shift where none may be.
    """
    s = scale.double()
    o = torch.zeros_like(s) if shift is None else shift.double()
    if not bool((s > 0).all() and s.isfinite().all() and o.isfinite().all()):
        raise ValueError(f"{migration.path}: scales must be positive and finite")
    if bool(o.any()) and not migration.shiftable:
        raise ValueError(f"{migration.path}: zeros in place of its values forbid a shift")
    moves = bool(o.any())
    norm = layer_at(rewriter.graph_module, migration.path)
    bias = (_bias(norm, len(s)) + o) / s if norm.bias is not None or moves else None
    replace_tensors(rewriter, migration.path, norm.weight.detach().double() / s, bias)
    changes = [describe_change(migration.path, moved=o if moves else None, divided=s)]
    for path, columns in migration.readers.items():
        layer = layer_at(rewriter.graph_module, path)
        weight = layer.weight.detach().double()
        reads = columns >= 0
        index = columns.clamp(min=0)
        factors = torch.where(reads, s[index], torch.ones((), dtype=torch.float64))
        constant = weight @ (o[index] * reads)
        shifted = layer.bias is not None or moves
        bias = _bias(layer, layer.out_features) - constant if shifted else None
        replace_tensors(rewriter, path, weight * factors, bias)
        changes.append(
            describe_change(path, moved=-constant if moves else None, multiplied=factors)
        )
    return changes


def floored(scale: Tensor) -> Tensor:
    """`scale`, at least `SMALLEST` of its mean; ones where all of it is 0."""
    mean = scale.mean()
    return scale.clamp(min=float(mean) * SMALLEST) if float(mean) > 0 else torch.ones_like(scale)


def _is_norm(node: fx.Node, root: fx.GraphModule) -> bool:
    return node.op == "call_module" and isinstance(
        root.get_submodule(str(node.target)), nn.LayerNorm
    )


def _refuse(module: nn.LayerNorm, calls: int) -> str:
    if calls > 1:
        return "the layer norm is called more than once"
    if len(module.normalized_shape) != 1:
        return "the layer norm goes over more than the last dimension"
    if module.weight is None:
        return "the layer norm has no weight to take up the scale"
    return ""


def _bias(layer: Any, size: int) -> Tensor:
    if layer.bias is None:
        return torch.zeros(size, dtype=torch.float64)
    bias: Tensor = layer.bias.detach().double()
    return bias
