"""A quantizer for every weight that the plan names, its parameters found from the weight."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxquant.plan.operations import layer_of
from fxquant.plan.plan import Plan
from fxquant.simulate.observers import weight_qparams
from fxquant.simulate.quantizers import WeightQuantizer
from fxquant.simulate.weight_fit import WeightRefusal, fit_weight

__all__ = ["weight_quantizers"]


def weight_quantizers(
    fused: fx.GraphModule, plan: Plan, refusal: WeightRefusal | None = None
) -> tuple[dict[str, nn.Module], list[str]]:
    """The quantizer of each convolution and linear layer by node name, and notes for the report.

    Where `refusal` says that a target could not compute with a layer's integers exactly, they lose
    a bit and a note says so.
    """
    quantizers: dict[str, nn.Module] = {}
    notes: list[str] = []
    for node in fused.graph.nodes:
        spec = plan.weights.get(node.name)
        layer: Any = layer_of(node, fused)
        if spec is None or layer is None:
            continue
        axis = 1 if type(layer).__name__.startswith("ConvTranspose") else 0
        if axis == 1 and layer.groups > 1:
            spec = spec.per_tensor()
        qparams = weight_qparams(layer.weight.detach(), spec, axis)
        if plan.runs_on_integers(node):
            path, weight = str(node.target), layer.weight.detach()
            qparams, note = fit_weight(path, weight, spec, qparams, refusal)
            notes += [note] if note else []
        # Weights stay float until the activations have been observed.
        quantizers[node.name] = WeightQuantizer(qparams, enabled=False)
    return quantizers, notes
