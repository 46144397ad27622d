"""Outlier channels in the middle of an MLP, computed apart so that each part has its own grid.

One channel of a hidden value that reaches 25 times as far as all others makes one grid for the
tensor 25 times as coarse (Dettmers et al., LLM.int8(), NeurIPS 2022, compute such channels apart
in float).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import RecipeError
from fxquant.even_out.channel_ranges import ChannelRange
from fxquant.even_out.hidden_pairs import SPLIT, HiddenPair, find_pairs
from fxquant.plan.operations import layer_of
from passes import (
    Decline,
    FuseConvBnRelu,
    FusedLayer,
    Pass,
    PassResult,
    Rewriter,
    TensorInfo,
    add_relu,
    tensor_info,
)
from passes.infra.stored import free_path
from passes.layers.questions import activation_of
from passes.layers.replace import make_linear

__all__ = ["SplitOutliers"]

_MOST = 0.05  # the share of the channels that may be computed apart
_JOINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (torch.add, {"alpha": 1}),
    "relu": (add_relu, {}),
}


class SplitOutliers(Pass):
    """Compute outlier channels between two linear layers apart.

        before                             after
        h = fc1(x)                         h = fc1(x)            o = fc1_outliers(x)
        h = F.gelu(h)                      h = F.gelu(h)         o = F.gelu(o)
        y = fc2(h)                         m = fc2(h)            p = fc2_outliers(o)
                                           y = torch.add(m, p)

    Split by the rows W₁[i], b₁[i] of the first layer and the columns W₂[:, i] of the second,

        W₂ f(W₁ x + b₁) + b₂ = Σ_P  W₂[:, P] f(W₁[P] x + b₁[P])  + b₂

    holds for every partition of the channels into sets P and every elementwise f, so that each
    set is a pair of ordinary layers with scales of its own.

    Between the layers may stand any elementwise functions of one value, or none, and nobody else
    may read what is in between. Of the channels by their largest magnitude, the fewest are taken
    whose removal shrinks the range at least `ratio` times; then again, into a pair of layers of
    their own (``fc1_outliers_2``), while their number in all is at most a twentieth of the
    channels (or one). The parts keep the layers' module path in their meta, so that selectors of
    a recipe pick them with the layer. What was split once is left alone.

    Declines where a pair shares a layer with one that shrinks more.

    Args:
        ranges: of what the second layers read, by their paths.
        ratio: above 1.

    Raises RecipeError for a ratio out of bounds.
    """

    exact = True
    after = (FuseConvBnRelu,)

    def __init__(self, ranges: Mapping[str, ChannelRange], ratio: float = 4.0) -> None:
        if not ratio > 1:
            raise RecipeError(f"split_outliers: a ratio of ranges is above 1, got {ratio!r}")
        self.ranges, self.ratio = dict(ranges), ratio

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Split every pair that was measured and has outliers; the notes say which channels."""
        pairs = [pair for pair in find_pairs(graph_module) if pair.path in self.ranges]
        largest = {pair: self.ranges[pair.path].largest for pair in pairs}
        chosen = {
            pair: groups for pair in pairs if (groups := _outliers(largest[pair], self.ratio))
        }
        rewriter = Rewriter(graph_module)
        notes: dict[HiddenPair, str] = {}
        declines: list[Decline] = []
        for pair in sorted(chosen, key=lambda pair: -_gain(largest[pair], chosen[pair])):
            layers = {pair.first, pair.second}
            better = next((done for done in notes if layers & {done.first, done.second}), None)
            if better is not None:
                reason = f"shares a layer with the pair of {better.path}, which shrinks more"
                declines.append(Decline.at(pair.second, reason))
                continue
            notes[pair] = _note(pair.path, largest[pair], chosen[pair])
            _split(rewriter, pair, chosen[pair])
        return PassResult(
            rewriter.finish() if notes else False,
            tuple(declines),
            tuple(notes[pair] for pair in pairs if pair in notes),
        )


# -- which channels ------------------------------------------------------------------------


def _outliers(largest: Tensor, ratio: float) -> list[Tensor]:
    """The outlier channels, in sets of like range, the farthest first; each in ascending order."""
    values, order = largest.double().sort(descending=True, stable=True)
    limit = min(max(1, int(_MOST * len(values))), len(values) - 1)
    groups: list[Tensor] = []
    start = 0
    while True:
        # Beside zeros, which every grid holds, nothing is an outlier.
        near = values[start : limit + 1]
        beyond = torch.nonzero((near > 0) & (near * ratio <= values[start]))
        if not len(beyond):
            return groups
        end = start + int(beyond[0])
        groups.append(order[start:end].sort().values)
        start = end


def _others(largest: Tensor, groups: list[Tensor]) -> float:
    return float(largest.index_fill(0, torch.cat(groups), 0.0).amax())


def _gain(largest: Tensor, groups: list[Tensor]) -> float:
    return float(largest.amax()) / _others(largest, groups)


# -- the rewrite -------------------------------------------------------------------------


def _split(rewriter: Rewriter, pair: HiddenPair, groups: list[Tensor]) -> None:
    root = rewriter.graph_module
    first: Any = layer_of(pair.first, root)
    second: Any = layer_of(pair.second, root)
    before, behind = activation_of(pair.first), activation_of(pair.second)
    main = torch.ones(first.out_features, dtype=torch.bool)
    main[torch.cat(groups)] = False
    rest = torch.nonzero(main).flatten()

    sums = []
    for number, group in enumerate(groups, 1):
        suffix = "_outliers" if number == 1 else f"_outliers_{number}"
        with rewriter.before(pair.second):
            value = rewriter.call_module(
                free_path(root, f"{pair.first.target}{suffix}"),
                _rows(first, group, before),
                pair.first.args,
                like=pair.first,
            )
            _annotate(value, pair.first, len(group))
            for function in pair.functions:
                value = _copy_call(rewriter, function, value)
                _annotate(value, function, len(group))
            total = rewriter.call_module(
                free_path(root, f"{pair.path}{suffix}"),
                _columns(second, group, None),
                (value,),
                like=pair.second,
            )
        total.meta[SPLIT] = True
        sums.append(total)

    rewriter.set_module(str(pair.first.target), _rows(first, rest, before))
    for node in (pair.first, *pair.functions):
        _annotate(node, node, len(rest))
    # The layer comes last, so that what a recipe says of the last layer holds for it.
    with rewriter.before(pair.second):
        total = rewriter.call_module(
            pair.path,
            _columns(second, rest, second.bias),
            pair.second.args,
            like=pair.second,
            name=f"{pair.second.name}_main",
        )
        total.meta[SPLIT] = True
        for other in sums[1:]:
            total = rewriter.call_function(
                torch.add, (total, other), {"alpha": 1}, like=pair.second
            )
    join, kwargs = _JOINS[behind]
    rewriter.replace_call(pair.second, join, (total, sums[0]), kwargs, sources=(pair.first,))


def _rows(layer: nn.Linear, channels: Tensor, activation: str) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach()[channels]
    rows = make_linear(layer.weight.detach()[channels], bias)
    return rows if activation == "none" else FusedLayer(rows, activation).eval()


def _columns(layer: nn.Linear, channels: Tensor, bias: Tensor | None) -> nn.Linear:
    return make_linear(layer.weight.detach()[:, channels], bias)


def _copy_call(rewriter: Rewriter, node: fx.Node, operand: fx.Node) -> fx.Node:
    args: Any = fx.map_arg(node.args, lambda source: operand)
    kwargs: Any = fx.map_arg(node.kwargs, lambda source: operand)
    target: Any = node.target
    return rewriter.call_function(target, args, kwargs, like=node, name=f"{node.name}_outliers")


def _annotate(node: fx.Node, like: fx.Node, channels: int) -> None:
    info = tensor_info(like)
    assert info is not None
    node.meta["tensor"] = TensorInfo((*info.shape[:-1], channels), info.dtype)
    node.meta[SPLIT] = True


def _note(path: str, largest: Tensor, groups: list[Tensor]) -> str:
    others = _others(largest, groups)
    parts = []
    for index, group in enumerate(groups):
        of = "" if index else f" of {len(largest)} channels"
        verb = "reaches" if len(group) == 1 else "reach"
        parts.append(f"{len(group)}{of} {verb} {float(largest[group].amax()):.3g}")
    return f"{path}: {', '.join(parts)}, the others {others:.3g}: computed apart"
