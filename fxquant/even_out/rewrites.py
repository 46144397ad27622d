"""Which rewrites a recipe asks for, in their order, and what each has measured before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxquant.even_out.channel_ranges import ChannelRange, measure_ranges
from fxquant.even_out.equalize import Equalize
from fxquant.even_out.hidden_pairs import find_pairs
from fxquant.even_out.migrations import find_migrations
from fxquant.even_out.reparameterize import Reparameterize
from fxquant.even_out.smooth_quant import SmoothQuant
from fxquant.even_out.split_outliers import SplitOutliers
from fxquant.recipe import Recipe
from passes import InferRanges, Pass

__all__ = ["MeasuredRewrite", "measured_rewrites"]

Data = Iterable[tuple[Any, ...]]


@dataclass(frozen=True)
class MeasuredRewrite:
    """A rewrite of the fused graph.

    Attributes:
        kind: the pass.
        reads_data: whether its ranges are measured in a sweep over the data.
        make: measures the ranges of a graph as it is, and gives the passes to run on it.
    """

    kind: type[Pass]
    reads_data: bool
    make: Callable[[fx.GraphModule, Data], list[Pass]]


def measured_rewrites(recipe: Recipe) -> list[MeasuredRewrite]:
    """What `recipe` evens out. Each is measured on what the one before left."""

    def split(fused: fx.GraphModule, data: Data) -> list[Pass]:
        paths = [pair.path for pair in find_pairs(fused)]
        ranges = measure_ranges(fused, paths, data, of="inputs")
        return [SplitOutliers(ranges, float(recipe.split_outliers)), InferRanges()]

    def norms(fused: fx.GraphModule, data: Data) -> dict[str, ChannelRange]:
        paths = [place.path for place in find_migrations(fused)[0]]
        return measure_ranges(fused, paths, data, of="outputs")

    def smooth(fused: fx.GraphModule, data: Data) -> list[Pass]:
        return [SmoothQuant(norms(fused, data), float(recipe.smooth_quant))]

    def reparameterize(fused: fx.GraphModule, data: Data) -> list[Pass]:
        return [Reparameterize(norms(fused, data))]

    asked = (
        (recipe.equalize, MeasuredRewrite(Equalize, False, lambda fused, data: [Equalize()])),
        (recipe.split_outliers, MeasuredRewrite(SplitOutliers, True, split)),
        (recipe.smooth_quant, MeasuredRewrite(SmoothQuant, True, smooth)),
        (recipe.reparameterize, MeasuredRewrite(Reparameterize, True, reparameterize)),
    )
    return [rewrite for wanted, rewrite in asked if wanted]
