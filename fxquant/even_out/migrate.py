"""Even out the channels of what layer norms give, so that one 8-bit grid serves all of them.

The channels of a transformer's LayerNorm outputs differ in range by orders of magnitude, and a
grid for the whole tensor rounds the small ones away. Both methods here change float parameters
only, and leave the network's function as it is (`fxquant.migrations`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxquant.errors import RecipeError
from fxquant.even_out.channel_ranges import ChannelRanges, Extremes
from fxquant.even_out.migrations import Migration, apply_migration, find_migrations
from fxquant.simulate.observers import make_observer, weight_qparams
from fxquant.spec import QuantSpec
from passes import FusedLayer

__all__ = ["reparameterize", "smooth_quant"]

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ROWS = 1024
_FINEST = 2.0**-8  # of the mean: what lies below loses float precision and gains nothing
_ACTIVATIONS = QuantSpec(8, "affine", observer="min_max")
_WEIGHTS = QuantSpec(8, "symmetric", "per_channel", "abs_max", kind="weight")


def smooth_quant(
    fused: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    alpha: float | Literal["auto"] = 0.5,
    *,
    center: bool = False,
    values: bool = False,
    extremes: Extremes = "all",
    activations: QuantSpec = _ACTIVATIONS,
    weights: QuantSpec = _WEIGHTS,
) -> list[str]:
    """SmoothQuant (Xiao et al., ICML 2023, equation 4); returns the notes.

        s_j = max|X_j|^α / max|W_j|^(1−α)

    with X_j a channel's values in `data` and W_j the columns of all layers that read it.

    Args:
        fused: the annotated float graph; its layers are replaced.
        data: tuples of the graph's arguments, read once.
        alpha: how much of the range moves into the weights, 0 to 1. ``"auto"`` takes, place by
            place, the one of `ALPHAS`, or no migration, whose layers have the least squared error
            with `activations` and `weights`.
        center: first move the middle of each channel's range to 0, where nothing pads the value
            (channel-wise shifting: Wei et al., Outlier Suppression+, EMNLP 2023).
        values: also scale the values of attentions against the projections behind them.
        extremes: which extremes make max|X_j|.
        activations, weights: the grids that ``"auto"`` tries.

    Raises RecipeError for an alpha outside [0, 1], CalibrationError for the data.
    """
    if alpha != "auto" and not 0 <= alpha <= 1:
        raise RecipeError(f'smooth_quant: alpha lies between 0 and 1 or is "auto", got {alpha!r}')
    places = [place for place in find_migrations(fused) if place.kind == "norm" or values]
    ranges = _ranges(fused, data, places, rows=_ROWS if alpha == "auto" else 0)
    chosen = []
    for place in places:
        low, high = ranges.range(place.producer, extremes)
        shift = -(low + high) / 2 if center and place.shiftable else torch.zeros_like(low)
        largest = torch.maximum((low + shift).abs(), (high + shift).abs())
        if alpha == "auto":
            best = _best_alpha(
                fused, place, ranges.sample(place.producer), largest, shift, activations, weights
            )
        else:
            best = alpha
        chosen.append("none" if best is None else f"{best:g}")
        apply_migration(fused, place, _smoothing(fused, place, largest, best), shift)
    counts = ", ".join(f"{name}: {chosen.count(name)}" for name in sorted(set(chosen)))
    return [f"smooth quant: {len(places)} places" + (f", alpha {counts}" if places else "")]


def reparameterize(
    fused: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    *,
    extremes: Extremes = "all",
    bits: int = 8,
    fewest: int = 512,
) -> list[str]:
    """Scale reparameterization (RepQ-ViT: Li et al., ICCV 2023, section 3.2); returns the notes.

    A grid for each channel, s and z, becomes one grid for all, s̃ = mean(s) and z̃ = mean(z):

        r₁ = s / s̃    r₂ = z − z̃    γ' = γ / r₁    β' = (β + s⊙r₂) / r₁

    so that ``y'/s̃ + z̃ = y/s + z``: the codes are the same. The layers that read y take up the
    rest, ``W' = W · diag(r₁)`` and ``b' = b − W · (s⊙r₂)``. Where zeros are padded in between, a
    grid around 0 gives r₁ and r₂ is 0.

    Args:
        fused: the annotated float graph; its layers are replaced.
        data: tuples of the graph's arguments, read once.
        extremes: which extremes the grids of the channels span.
        bits: of the grids.
        fewest: what was seen in fewer rows keeps its one grid: the range of a channel would be
            too narrow for what comes later.

    Raises CalibrationError for the data.
    """
    places = [place for place in find_migrations(fused) if place.kind == "norm"]
    ranges = _ranges(fused, data, places)
    seen = [place for place in places if ranges.rows(place.producer) >= fewest]
    shifted = 0
    for place in seen:
        low, high = (bound.double() for bound in ranges.range(place.producer, extremes))
        if place.shiftable:
            scale = _floored((high - low) / (2**bits - 1))
            zero_point = -low / scale
            apply_migration(
                fused, place, scale / scale.mean(), scale * (zero_point - zero_point.mean())
            )
            shifted += 1
        else:
            scale = _floored(torch.maximum(-low, high))
            apply_migration(fused, place, scale / scale.mean())
    notes = [f"scale reparameterization: {len(seen)} places, {shifted} of them with a shift"]
    if len(seen) < len(places):
        names = ", ".join(place.producer for place in places if place not in seen)
        notes.append(f"no scale reparameterization of {names}: seen in fewer than {fewest} rows")
    return notes


def _floored(scale: Tensor) -> Tensor:
    mean = scale.mean()
    return scale.clamp(min=float(mean) * _FINEST) if float(mean) > 0 else torch.ones_like(scale)


def _ranges(
    fused: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    places: list[Migration],
    rows: int = 0,
) -> ChannelRanges:
    ranges = ChannelRanges(fused, [place.producer for place in places], rows=rows)
    return ranges.sweep(data) if places else ranges


def _smoothing(
    fused: fx.GraphModule, place: Migration, largest: Tensor, alpha: float | None
) -> Tensor:
    """Equation 4 over the channels; 1 where a channel or all its weights are 0."""
    x = largest.double()
    if alpha is None:
        return torch.ones_like(x)
    w = torch.zeros_like(x)
    for reader in place.readers:
        columns = _weight(fused, reader.path).double().abs().amax(0)
        reads = reader.columns >= 0
        w.scatter_reduce_(0, reader.columns[reads], columns[reads], "amax")
    usable = (x > 0) & (w > 0)
    scale = torch.where(usable, x, 1.0) ** alpha / torch.where(usable, w, 1.0) ** (1 - alpha)
    return torch.where(usable, _floored(scale), 1.0)


def _best_alpha(
    fused: fx.GraphModule,
    place: Migration,
    sample: Tensor,
    largest: Tensor,
    shift: Tensor,
    activations: QuantSpec,
    weights: QuantSpec,
) -> float | None:
    """The alpha of the least squared error of the layers behind, or None for no migration."""

    def error(alpha: float | None) -> float:
        scale = _smoothing(fused, place, largest, alpha).float()
        observer = make_observer(activations, name=place.producer)
        x = (sample + shift) / scale
        observer.update(x[None])
        rounded = observer.qparams().fake_quantize(x)
        total = 0.0
        for reader in place.readers:
            reads = reader.columns >= 0
            weight = _weight(fused, reader.path)[:, reads] * scale[reader.columns[reads]]
            exact, seen = x[:, reader.columns[reads]], rounded[:, reader.columns[reads]]
            coarse = weight_qparams(weight, weights).fake_quantize(weight)
            want = exact @ weight.T
            total += float((seen @ coarse.T - want).square().sum() / want.square().sum())
        return total

    return min((None, *ALPHAS), key=error)


def _weight(fused: fx.GraphModule, path: str) -> Tensor:
    module: Any = fused.get_submodule(path)
    layer = module.layer if isinstance(module, FusedLayer) else module
    weight: Tensor = layer.weight.detach().float()
    return weight
