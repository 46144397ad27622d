"""Calibrated simulated graphs of small networks, without the rest of `fxquant.compile`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.frontend.trace import trace
from fxquant.plan.plan import make_plan
from fxquant.recipe import Recipe
from fxquant.simulate.calibrate import calibrate
from fxquant.simulate.calibration_set import CalibrationSet
from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.simulate.weight_quantizers import weight_quantizers
from passes import (
    AssignOneSided,
    Canonicalize,
    EliminateNoops,
    FoldBatchNorm,
    FuseConvBnRelu,
    InferRanges,
    InsertQuantDequant,
    Pass,
    Pipeline,
    QuantizerSite,
    SplitSharedModules,
    copy_sharing_tensors,
)
from tests.fxquant.small_networks import Residual

__all__ = ["Graphs", "graphs", "state"]


@dataclass
class Graphs:
    """The stages that reconstruction reads, and the images they were calibrated on."""

    simulated: fx.GraphModule
    fused: fx.GraphModule
    float_graph: fx.GraphModule
    data: CalibrationSet


def graphs(
    model: nn.Module | None = None,
    changes: dict[str, Any] | None = None,
    *,
    images: Tensor | None = None,
) -> Graphs:
    """A `Residual` (or `model`) at two-bit weights and four-bit activations, with `changes`."""
    if model is None:
        torch.manual_seed(0)
        model = Residual()
    if images is None:
        images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    recipe = Recipe.named("w4a8").replace(
        {
            "weights.bits": 2,
            # Three levels: the coarsest grid there is leaves the most to learn.
            "weights.scheme": "symmetric",
            "activations.bits": 4,
            "bias_correction": False,
            **(changes or {}),
        }
    )
    data = CalibrationSet(images, model=model)
    probe = tuple(value[:1] for value in data.first)

    def run(graph: fx.GraphModule, *steps: Pass) -> fx.GraphModule:
        Pipeline(steps).run(graph, probe)
        return graph

    float_graph = run(
        trace(model, 1).graph_module, Canonicalize(), SplitSharedModules(), EliminateNoops()
    )
    fused = run(copy_sharing_tensors(float_graph), FoldBatchNorm(), FuseConvBnRelu(), InferRanges())
    plan = make_plan(fused, recipe)
    weights, _ = weight_quantizers(fused, plan)
    sites = [
        QuantizerSite(
            site.path, ActivationQuantizer(site.spec, channelwise=site.channelwise), site.nodes
        )
        for site in plan.values
    ]
    simulated = run(
        copy_sharing_tensors(fused), InsertQuantDequant(sites, weights), AssignOneSided()
    )
    calibrate(simulated, data)
    return Graphs(simulated, fused, float_graph, data)


def state(simulated: fx.GraphModule) -> dict[str, Tensor]:
    """Everything that a reconstruction decides: codes and scales by path."""
    found: dict[str, Tensor] = {}
    for path, module in simulated.named_modules():
        if isinstance(module, ActivationQuantizer):
            found[path] = module.qparams.scale
        codes = getattr(module, "codes", None)
        if isinstance(codes, Tensor):
            found[path] = codes
    return found
