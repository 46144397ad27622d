"""Cross-layer equalization (Nagel et al., Data-Free Quantization, ICCV 2019, section 4.1)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.even_out.layers import describe_change, layer_at, replace_tensors
from fxquant.plan.operations import layer_of
from passes import Decline, FuseConvBnRelu, Pass, PassResult, Rewriter
from passes.infra.stored import call_sites
from passes.layers.questions import activation_of

__all__ = ["Equalize"]

_MOST_ROUNDS = 100  # 26 pairs in a row settle in 19
_SETTLED = 1e-3


class Equalize(Pass):
    """Let neighbouring layers trade scale, so that both weights use their range alike.

        before                        after
        y = relu(W₁ x + b₁)           y' = relu(W₁' x + b₁')
        z = W₂ y + b₂                 z  = W₂' y' + b₂

    W₁'[i] = W₁[i] / s_i    b₁'[i] = b₁[i] / s_i    W₂'[:, i] = W₂[:, i] · s_i

        s_i = √(r₁[i] · r₂[i]) / r₂[i]

    with r₁[i] = max |W₁[i]| and r₂[i] = max |W₂[:, i]|, over all pairs in turn until the scales
    settle. Exact for no activation and for ReLU; ReLU6 is not scale-equivariant.

    Declines where a layer in front of another one of its kind ends in another activation, where
    somebody else reads the value, where the second layer also adds a residual, and where one of
    the two is called more than once.
    """

    exact = True
    after = (FuseConvBnRelu,)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Equalize until no scale is a thousandth from 1: what is settled stays as it is."""
        pairs, declines = _pairs(graph_module)
        start = {path: _Scaled(layer_at(graph_module, path)) for pair in pairs for path in pair}
        layers = start
        for _ in range(_MOST_ROUNDS):
            further, change = _round(layers, pairs)
            if change < _SETTLED:
                break
            layers = further
        if layers is start:
            return PassResult(False, tuple(declines))
        rewriter = Rewriter(graph_module)
        for path, scaled in layers.items():
            replace_tensors(rewriter, path, scaled.weight, scaled.bias)
        return PassResult(
            rewriter.finish(),
            tuple(declines),
            (f"cross-layer equalization: {len(pairs)} pairs of layers",),
            tuple(
                describe_change(path, divided=scaled.divided, multiplied=scaled.multiplied)
                for path, scaled in layers.items()
            ),
        )


class _Scaled:
    """A layer's tensors once scaled, and by what in all; scaling gives a new one."""

    def __init__(self, layer: Any) -> None:
        self.groups = int(getattr(layer, "groups", 1))
        self.weight: Tensor = layer.weight.detach()
        self.bias: Tensor | None = None if layer.bias is None else layer.bias.detach()
        self.divided: Tensor | None = None
        self.multiplied: Tensor | None = None

    def divide(self, scale: Tensor) -> _Scaled:
        """The output channels divided."""
        new = copy.copy(self)
        new.weight = self.weight / scale.view(-1, *([1] * (self.weight.dim() - 1)))
        new.bias = None if self.bias is None else self.bias / scale
        new.divided = scale if self.divided is None else self.divided * scale
        return new

    def multiply(self, scale: Tensor) -> _Scaled:
        """What reads each input channel multiplied."""
        new = copy.copy(self)
        outputs = self.weight.shape[0]
        rows = scale.view(self.groups, 1, -1).expand(-1, outputs // self.groups, -1)
        new.weight = self.weight * rows.reshape(outputs, -1, *([1] * (self.weight.dim() - 2)))
        new.multiplied = scale if self.multiplied is None else self.multiplied * scale
        return new

    def largest_of_inputs(self) -> Tensor:
        """The largest weight that reads each input channel, [C_in]."""
        magnitude = self.weight.abs()
        per_group = magnitude.flatten(2).amax(2) if magnitude.dim() > 2 else magnitude
        return per_group.view(self.groups, -1, per_group.shape[1]).amax(1).flatten()


def _round(
    layers: dict[str, _Scaled], pairs: list[tuple[str, str]]
) -> tuple[dict[str, _Scaled], float]:
    """Every pair evened out once, each on what the one before left, and the farthest scale."""
    layers, change = dict(layers), 0.0
    for first, second in pairs:
        scale = _scale(layers[first], layers[second])
        change = max(change, float((scale - 1).abs().max()))
        layers[first] = layers[first].divide(scale)
        layers[second] = layers[second].multiply(scale)
    return layers, change


def _reads(node: fx.Node) -> int:
    """How many values a layer reads; one that is input and residual at once counts twice."""
    return len(node.args) + len(node.kwargs)


def _pairs(fused: fx.GraphModule) -> tuple[list[tuple[str, str]], list[Decline]]:
    """The paths of neighbouring layers, in execution order, and where one only looks like it."""
    pairs, declines = [], []
    calls = call_sites(fused.graph)
    for node in fused.graph.nodes:
        first = layer_of(node, fused)
        if not isinstance(first, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            continue
        users = [user for user in node.users if type(layer_of(user, fused)) is type(first)]
        if not users or _reads(node) != 1:
            continue
        activation = activation_of(node)
        if len(node.users) > 1:
            declines.append(Decline.at(node, f"feeds {len(node.users)} nodes"))
        elif _reads(users[0]) != 1:
            declines.append(Decline.at(node, f"{users[0].name} also adds a residual"))
        elif activation not in ("none", "relu"):
            declines.append(Decline.at(node, f"{activation} is not scale-equivariant"))
        elif repeated := [str(n.target) for n in (node, users[0]) if calls[str(n.target)] > 1]:
            declines.append(Decline.at(node, f"{repeated[0]} is called more than once"))
        else:
            pairs.append((str(node.target), str(users[0].target)))
    return pairs, declines


def _scale(first: _Scaled, second: _Scaled) -> Tensor:
    r1 = first.weight.abs().flatten(1).amax(1)
    r2 = second.largest_of_inputs()
    usable = (r1 > 0) & (r2 > 0)
    return torch.where(usable, (r1 / r2).sqrt(), torch.ones_like(r1))
