"""Scale reparameterization (RepQ-ViT: Li et al., ICCV 2023): one grid for all channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxquant.even_out.channel_ranges import ChannelRange
from fxquant.even_out.layers import layer_at
from fxquant.even_out.migrations import apply_migration, find_migrations, floored
from passes import Decline, FuseConvBnRelu, Pass, PassResult, Rewriter

__all__ = ["Reparameterize"]

_STEPS = 255
_FEWEST = 512  # rows: from fewer, the range of a channel is too narrow for what comes later


class Reparameterize(Pass):
    """Give all channels of a layer norm one range.

        before                        after
        y = norm(x; γ, β)             y' = norm(x; γ', β')
        z = W y + b                   z  = W' y' + b'

    A grid for each channel, s and z, becomes one grid for all, s̃ = mean(s) and z̃ = mean(z):

        r₁ = s / s̃    r₂ = z − z̃    γ' = γ / r₁    β' = (β + s⊙r₂) / r₁

    so that ``y'/s̃ + z̃ = y/s + z``: the codes are the same. The layers that read y take up the
    rest, ``W' = W · diag(r₁)`` and ``b' = b − W · (s⊙r₂)``. Where zeros are padded in between, a
    grid around 0 gives r₁ and r₂ is 0. Without it the ranges of a transformer's channels differ
    by orders of magnitude, and one grid rounds the small ones away.

    Declines where anything but linear layers reads a channel, where the norm has no weight, where
    it was seen in fewer than 512 rows, and where it is not the norm that was measured.

    Args:
        ranges: of the norms' outputs, by path.
    """

    exact = True
    after = (FuseConvBnRelu,)

    def __init__(self, ranges: Mapping[str, ChannelRange]) -> None:
        self.ranges = dict(ranges)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Reparameterize every place that was measured."""
        places, declines = find_migrations(graph_module)
        rewriter = Rewriter(graph_module)
        changes: list[str] = []
        done = shifted = 0
        for place in places:
            found = self.ranges.get(place.path)
            if found is None or found.weight is not layer_at(graph_module, place.path).weight:
                declines.append(Decline.at(place.node, "its ranges were not measured as it is"))
                continue
            if found.rows < _FEWEST:
                declines.append(Decline.at(place.node, f"seen in fewer than {_FEWEST} rows"))
                continue
            low, high = found.low.double(), found.high.double()
            if place.shiftable:
                scale = floored((high - low) / _STEPS)
                zero_point = -low / scale
                shift = scale * (zero_point - zero_point.mean())
                changes += apply_migration(rewriter, place, scale / scale.mean(), shift)
                shifted += 1
            else:
                scale = floored(torch.maximum(-low, high))
                changes += apply_migration(rewriter, place, scale / scale.mean())
            done += 1
        notes = f"scale reparameterization: {done} places, {shifted} of them with a shift"
        return PassResult(
            rewriter.finish(), tuple(declines), (notes,) if done else (), tuple(changes)
        )
