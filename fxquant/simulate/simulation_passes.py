"""Which passes make the simulated graph of a fused one, with the modules that they place."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxquant.plan.plan import Plan
from fxquant.simulate.nonlinear import simulated_forms
from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.simulate.recurrent import QuantizeRecurrentWeights, recurrent_quantizers
from fxquant.simulate.weight_fit import WeightRefusal
from fxquant.simulate.weight_quantizers import weight_quantizers
from passes import AssignOneSided, InsertQuantDequant, Pass, QuantizerSite, ReplaceIntegerOps

__all__ = ["SIMULATION_PASSES", "simulation_passes"]

SIMULATION_PASSES: tuple[type[Pass], ...] = (
    ReplaceIntegerOps,
    InsertQuantDequant,
    QuantizeRecurrentWeights,
    AssignOneSided,
)
"""All that `simulation_passes` may ask for."""


def simulation_passes(
    fused: fx.GraphModule,
    plan: Plan,
    refusal: WeightRefusal | None = None,
    *,
    one_sided: bool = True,
) -> tuple[list[Pass], list[str]]:
    """The passes to run on a copy of `fused`, and notes on weights that lost a bit.

    `refusal` says with which weights a target cannot compute; `one_sided` whether quantizers of
    values that are never negative begin at zero. Raises CompileError where `plan` is of another
    graph.
    """
    plan.check(fused.graph)
    weights, notes = weight_quantizers(fused, plan, refusal)
    recurrent, recurrent_notes = recurrent_quantizers(fused, plan.weights, refusal)
    sites = [
        QuantizerSite(
            site.path,
            ActivationQuantizer(
                site.spec,
                channelwise=site.channelwise,
                fixed=site.fixed,
                sources=len(site.nodes),
            ),
            site.nodes,
        )
        for site in plan.values
    ]
    passes: list[Pass] = [
        ReplaceIntegerOps(simulated_forms(fused, plan)),
        InsertQuantDequant(sites, weights, _reads_quantized(plan)),
    ]
    if recurrent:
        passes.append(QuantizeRecurrentWeights(recurrent))
    if one_sided:
        passes.append(AssignOneSided())
    return passes, [*notes, *recurrent_notes]


def _reads_quantized(plan: Plan) -> Callable[[fx.Node, fx.Node], bool]:
    """Integer operations read quantized values; what stays float reads a float source as it is."""

    def reads(value: fx.Node, user: fx.Node) -> bool:
        return plan.runs_on_integers(value) or plan.runs_on_integers(user)

    return reads
