"""SmoothQuant (Xiao et al., ICML 2023): range moves from activations into weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxquant.errors import RecipeError
from fxquant.even_out.channel_ranges import ChannelRange
from fxquant.even_out.layers import layer_at
from fxquant.even_out.migrations import Migration, apply_migration, find_migrations, floored
from passes import Decline, FuseConvBnRelu, Pass, PassResult, Rewriter

__all__ = ["SmoothQuant"]


class SmoothQuant(Pass):
    """Divide the channels of layer norms by what evens out activations and weights.

        before                        after
        y = norm(x; γ, β)             y' = norm(x; γ / s, β / s)
        z = W y + b                   z  = W diag(s) y' + b

        s_j = max|X_j|^α / max|W_j|^(1−α)                                  (equation 4)

    with X_j a channel's values in `ranges` and W_j the columns of all layers that read it.

    Declines where anything but linear layers reads a channel, where the norm has no weight, and
    where it is not the norm that was measured.

    Args:
        ranges: of the norms' outputs, by path.
        alpha: how much of the range moves into the weights, 0 to 1.

    Raises RecipeError for an alpha outside [0, 1].
    """

    exact = True
    after = (FuseConvBnRelu,)

    def __init__(self, ranges: Mapping[str, ChannelRange], alpha: float = 0.5) -> None:
        if not 0 <= alpha <= 1:
            raise RecipeError(f"smooth_quant: alpha lies between 0 and 1, got {alpha!r}")
        self.ranges, self.alpha = dict(ranges), alpha

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Smooth every place that was measured."""
        places, declines = find_migrations(graph_module)
        rewriter = Rewriter(graph_module)
        changes: list[str] = []
        notes: tuple[str, ...] = ()
        smoothed = 0
        for place in places:
            found = self.ranges.get(place.path)
            if found is None or found.weight is not layer_at(graph_module, place.path).weight:
                declines.append(Decline.at(place.node, "its ranges were not measured as it is"))
                continue
            scale = _scale(graph_module, place, found.largest, self.alpha)
            changes += apply_migration(rewriter, place, scale)
            smoothed += 1
        if smoothed:
            notes = (f"smooth quant: {smoothed} places, alpha {self.alpha:g}",)
        return PassResult(rewriter.finish(), tuple(declines), notes, tuple(changes))


def _scale(fused: fx.GraphModule, place: Migration, largest: Tensor, alpha: float) -> Tensor:
    """Equation 4 over the channels; 1 where a channel or all its weights are 0."""
    x = largest.double()
    w = torch.zeros_like(x)
    for path, read in place.readers.items():
        columns = layer_at(fused, path).weight.detach().double().abs().amax(0)
        reads = read >= 0
        w.scatter_reduce_(0, read[reads], columns[reads], "amax")
    usable = (x > 0) & (w > 0)
    scale = torch.where(usable, x, 1.0) ** alpha / torch.where(usable, w, 1.0) ** (1 - alpha)
    return torch.where(usable, floored(scale), 1.0)
