"""From a simulated graph to one whose weights and steps are trained, and the way back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.qat.quantizers import TrainableActivation, TrainableWeight
from fxquant.simulate.nonlinear import SimulatedForm
from fxquant.simulate.quantizers import ActivationQuantizer, RoundedWeightQuantizer, WeightQuantizer
from fxquant.simulate.recurrent import QuantizedRecurrent
from fxquant.simulate.weight_fit import WeightRefusal, stored_integers
from fxquant.spec import QParams
from passes import FusedLayer
from passes.fold_batch_norm import BATCH_NORMS

__all__ = ["batch_norms", "to_simulated", "to_trainable"]

_CELL = 0.49  # of a step: how far from its code a weight may lie at the start


# -- there -------------------------------------------------------------------------------


def to_trainable(simulated: fx.GraphModule, *, learn_steps: bool) -> fx.GraphModule:
    """A copy of a calibrated simulated graph in which every parameter takes a gradient.

    Nothing but the quantizers is exchanged: every module keeps its hyper-parameters. Weights
    whose codes were chosen by something better than nearest rounding start inside the cells of
    those codes. Batch norms without a counter of batches were frozen in the model and stay so.
    Grids that an integer form of an operation reads or dictates stay as well.
    """
    graph = copy.deepcopy(simulated)
    for parameter in graph.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for norm in graph.modules():
        if isinstance(norm, BATCH_NORMS) and norm.num_batches_tracked is None:
            norm.requires_grad_(False)
    for weight, quantizer, place in _weights(graph, WeightQuantizer):
        if isinstance(quantizer, RoundedWeightQuantizer):
            with torch.no_grad():
                weight.copy_(_inside_cells(weight, quantizer))
        if quantizer.enabled:
            place(TrainableWeight(quantizer, weight, learn=learn_steps))
    made: dict[nn.Module, TrainableActivation] = {}
    read_by_forms = [
        module.source for module in graph.modules() if isinstance(module, SimulatedForm)
    ]
    for path, module in list(graph.named_modules(remove_duplicate=False)):
        if not isinstance(module, ActivationQuantizer) or not module.has_qparams:
            continue
        if module.fixed is None and all(module is not source for source in read_by_forms):
            if module not in made:
                made[module] = TrainableActivation(module, learn=learn_steps)
            graph.set_submodule(path, made[module])
    return graph


def batch_norms(graph: nn.Module) -> list[nn.Module]:
    """The batch norms whose statistics may move."""
    return [
        module
        for module in graph.modules()
        if isinstance(module, BATCH_NORMS) and module.num_batches_tracked is not None
    ]


def _weights(graph: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[Tensor, Any, Any]]:
    """Every quantized weight, its quantizer of this kind, and how to put another in its place."""
    for module in graph.modules():
        if isinstance(module, FusedLayer) and isinstance(module.weight_quantizer, kind):
            layer: Any = module.layer

            def into_layer(new: nn.Module, owner: FusedLayer = module) -> None:
                owner.weight_quantizer = new

            yield layer.weight, module.weight_quantizer, into_layer
        elif isinstance(module, QuantizedRecurrent):
            for name, quantizer in list(module.quantizers.items()):
                if isinstance(quantizer, kind):

                    def into_table(
                        new: nn.Module, owner: Any = module.quantizers, key: str = name
                    ) -> None:
                        owner[key] = new

                    yield getattr(module.layer, name), quantizer, into_table


def _inside_cells(weight: Tensor, quantizer: RoundedWeightQuantizer) -> Tensor:
    qparams, codes = quantizer.qparams, quantizer.codes
    steps = codes.float() - qparams.aligned(qparams.zero_point, codes.dim())
    scale = qparams.aligned(qparams.scale, codes.dim())
    low = torch.where(codes == qparams.qmin, -math.inf, (steps - _CELL) * scale)
    high = torch.where(codes == qparams.qmax, math.inf, (steps + _CELL) * scale)
    return torch.minimum(torch.maximum(weight.detach(), low), high)


# -- and back ----------------------------------------------------------------------------


def to_simulated(
    trained: fx.GraphModule, *, refusal: WeightRefusal | None = None
) -> tuple[fx.GraphModule, Mapping[str, str]]:
    """A simulated graph with what was learned, and a note by module path where one is due.

    `trained` stays as it is. Weights whose integers a target refuses lose a bit, as at a compile.
    """
    graph = copy.deepcopy(trained).cpu().eval()
    graph.requires_grad_(False)
    paths = {id(module): path for path, module in graph.named_modules()}
    notes: dict[str, str] = {}
    for weight, quantizer, place in _weights(graph, TrainableWeight):
        qparams = quantizer.qparams(weight)
        path = paths[id(quantizer)].removesuffix(".weight_quantizer")
        while refusal is not None and (reason := refusal(stored_integers(weight, qparams))):
            qparams = _one_bit_less(qparams)
            bits = (qparams.qmax - qparams.qmin).bit_length()
            notes[path] = f"{path}: weights in {bits} bits after training, because {reason}"
        place(WeightQuantizer(qparams))
    for path, module in list(graph.named_modules(remove_duplicate=False)):
        if isinstance(module, TrainableActivation):
            graph.set_submodule(path, module.frozen())
    return graph, notes


def _one_bit_less(qparams: QParams) -> QParams:
    low, high = -((-qparams.qmin) // 2), qparams.qmax // 2
    return replace(
        qparams,
        scale=qparams.scale * (qparams.qmax / high),
        zero_point=(qparams.zero_point // 2).clamp(low, high).to(torch.int32),
        qmin=low,
        qmax=high,
    )
