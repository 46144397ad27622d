"""What a recipe leaves to raise: weights, values and whole layers, each with the harm it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from fxquant.compiled import CompiledModel
from fxquant.measure.sensitivity import Effect, Sensitivity
from fxquant.plan.plan import Plan
from fxquant.recipe import Override, Recipe
from passes import module_path

__all__ = [
    "Rung",
    "divergence",
    "few_bits",
    "free_changes",
    "noise",
    "raised",
    "to_float",
    "to_integers",
]

Harm = Callable[[Effect], float]
_COARSE_OBSERVERS = ("abs_max", "min_max", "moving_average_abs_max", "moving_average_min_max")


@dataclass(frozen=True)
class Rung:
    """Something to raise: a layer's weight, a value, or all that a module computes.

    `harm` is what goes away with it; `before` and `after` are its bits.
    """

    what: str
    path: str
    before: int | str
    after: int | str
    harm: float

    def __str__(self) -> str:
        change = f"{self.before} -> {self.after} bits"
        change = f"{self.before} bits -> float" if self.after == "float" else change
        return f"{self.what}{self.path and ' of '}{self.path}: {change}"

    def raised(self, recipe: Recipe) -> Recipe:
        """`recipe` with this raised."""
        # A regular expression names the one module; a glob would name what is below it, too.
        regex = re.escape(self.path)
        if self.what == "input":
            return recipe.replace({"input_bits": self.after})
        if self.after == "float":
            return recipe.replace({"float": [*recipe.float, f"regex:{regex}"]})
        bits = (("bits", self.after),)
        override = (
            Override(regex=regex, weights=bits)
            if self.what == "weights"
            else Override(regex=regex, activations=bits)
        )
        return recipe.replace({"overrides": [*recipe.overrides, override]})


def raised(recipe: Recipe, rungs: Iterable[Rung]) -> Recipe:
    """`recipe` with all of these raised."""
    for rung in rungs:
        recipe = rung.raised(recipe)
    return recipe


def _plan(q: CompiledModel) -> Plan:
    assert q.plan is not None
    return q.plan


def few_bits(q: CompiledModel, of: Literal["weights", "values"]) -> set[int]:
    """The bit widths below 8 of the weights, or of the values."""
    plan = _plan(q)
    specs = plan.weights.values() if of == "weights" else (site.spec for site in plan.values)
    return {spec.bits for spec in specs if spec.bits < 8}


def free_changes(recipe: Recipe, q: CompiledModel) -> dict[str, Any]:
    """What makes grids and roundings better and costs nothing when the model runs."""
    changes: dict[str, Any] = {}
    for name in ("weights", "activations"):
        if getattr(recipe, name).observer in _COARSE_OBSERVERS:
            changes[f"{name}.observer"] = "mse"
    if recipe.activations.depthwise == "per_tensor":
        changes["activations.depthwise"] = "per_channel"
    if few_bits(q, "weights") and recipe.reconstruction.method == "none":
        changes["reconstruction.method"] = "gptq"
    return changes


def to_integers(q: CompiledModel, found: Sensitivity, harm_of: Harm) -> list[Rung]:
    """Weights and values at more bits, each with the harm that this takes away."""
    nodes = {node.name: node for node in q.stages["fused"].graph.nodes}
    plan, rungs = _plan(q), {}
    weights, values = found.of("weight"), found.of("activation")
    for name, spec in plan.weights.items():
        path = module_path(nodes[name])
        if spec.bits < 8 and path in weights:
            harm = harm_of(weights[path][spec.bits]) - harm_of(weights[path][8])
            rungs["weights", path] = Rung("weights", path, spec.bits, 8, harm)
    for site in plan.values:
        effects = values.get(site.path.removeprefix("quantizers."), {})
        node: fx.Node = nodes[site.nodes[0]]
        path = module_path(node)
        is_input = node.op == "placeholder"
        if site.spec.bits not in effects or site.fixed or not (path or is_input):
            continue
        after = 8 if site.spec.bits < 8 else 16
        harm = harm_of(effects[site.spec.bits]) - (harm_of(effects[8]) if after == 8 else 0.0)
        what, path = ("input", "") if is_input else ("values", path)
        # Several values of one module go together.
        same = rungs.get((what, path))
        harm += same.harm if same else 0.0
        rungs[what, path] = Rung(what, path, site.spec.bits, after, harm)
    return list(rungs.values())


def to_float(q: CompiledModel, found: Sensitivity, harm_of: Harm) -> list[Rung]:
    """Whole modules in float, each with the harm that its weight and its values do at 8 bits."""
    nodes = {node.name: node for node in q.stages["fused"].graph.nodes}
    harms: dict[str, float] = {}
    for path, effects in found.of("weight").items():
        harms[path] = harm_of(effects[8])
    sites = {site.path.removeprefix("quantizers."): site for site in _plan(q).values}
    for name, effects in found.of("activation").items():
        path = module_path(nodes[sites[name].nodes[0]]) if name in sites else ""
        harms[path] = harms.get(path, 0.0) + harm_of(effects[8])
    return [Rung("all", path, 8, "float", harm) for path, harm in harms.items() if path]


def noise(effect: Effect) -> float:
    """Of the output, over its signal."""
    noise: float = 10 ** (-effect.sqnr_db / 10)
    return noise


def divergence(effect: Effect) -> float:
    """Of the prediction, in nats."""
    return noise(effect) if effect.kl is None else effect.kl
