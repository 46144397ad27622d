"""A simulated graph whose weights and steps can be trained, and the way back.

A step is trained through its logarithm, so that it stays positive and moves by a share of itself
(Jain et al. 2019, "Trained Quantization Thresholds"), with the gradient of LSQ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.simulate.nonlinear import SimulatedForm
from fxquant.simulate.quantizers import ActivationQuantizer, RoundedWeightQuantizer, WeightQuantizer
from fxquant.simulate.quantizers.straight_through import straight_through
from fxquant.simulate.recurrent import QuantizedRecurrent
from fxquant.simulate.weight_fit import WeightRefusal
from fxquant.spec import LARGEST_SCALE, SMALLEST_SCALE, QParams
from passes import FusedLayer
from passes.fold_batch_norm import BATCH_NORMS

__all__ = [
    "TrainableActivation",
    "TrainableWeight",
    "batch_norms",
    "to_simulated",
    "to_trainable",
]

_CELL = 0.49  # of a step: how far from its code a weight may lie at the start
_FINEST = 256  # a channel's step is at most this many times finer than the tensor's


class _Trainable(nn.Module):
    """A grid whose step is trained or follows something; codes and zero point stay."""

    start: Tensor

    def __init__(self, qparams: QParams, *, learn: bool) -> None:
        super().__init__()
        self.take(qparams)
        self.log_step = nn.Parameter(torch.zeros_like(self.start), requires_grad=learn)

    def take(self, qparams: QParams) -> None:
        """Stand on another grid of the same length."""
        device = self.start.device if hasattr(self, "start") else "cpu"
        self.grid = qparams
        self.register_buffer("start", qparams.scale.to(device), persistent=False)
        zeros = qparams.zero_point.float()
        self.zeros = zeros if bool((zeros != zeros[0]).any()) else float(zeros[0])

    def quantize(self, x: Tensor, step: Tensor, count: int) -> Tensor:
        """x on the grid of `step`; `count` of its values share a step."""
        zeros: Any = self.zeros
        if isinstance(zeros, Tensor):
            zeros = self.grid.aligned(zeros, x.dim()).to(x.device)
        low, high = self.grid.qmin - zeros, self.grid.qmax - zeros
        scale = 1 / math.sqrt(max(1, count) * self.grid.qmax)
        return straight_through(x, self.grid.aligned(step, x.dim()), low, high, scale)

    def _found(self, step: Tensor) -> QParams:
        scale = step.detach().float().cpu().clamp(SMALLEST_SCALE, LARGEST_SCALE)
        return replace(self.grid, scale=scale)


class TrainableWeight(_Trainable):
    """The quantizer of a weight during training.

    A step that is not learned follows the weight: its ratio to the root mean square of its
    channel stays what it was.
    """

    def __init__(self, inner: WeightQuantizer, weight: Tensor, *, learn: bool) -> None:
        super().__init__(inner.qparams, learn=learn)
        self.follow = not learn
        self.register_buffer("start_size", self._size(weight.detach()), persistent=False)

    start_size: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid, of its shape."""
        return self.quantize(weight, self._step(weight), weight.numel() // len(self.start))

    def qparams(self, weight: Tensor) -> QParams:
        """The grid that was found."""
        return self._found(self._step(weight))

    def _step(self, weight: Tensor) -> Tensor:
        step = self.start * self.log_step.exp()
        if self.follow:
            step = step * (self._size(weight.detach()) / self.start_size)
        return step

    def _size(self, weight: Tensor) -> Tensor:
        axis = self.grid.axis
        dims = [dim for dim in range(weight.dim()) if dim != axis]
        squares = weight.float().square().mean(dims if axis is not None else None).reshape(-1)
        return squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)


class TrainableActivation(_Trainable):
    """The quantizer of a value during training: it learns its step, or observes and quantizes."""

    def __init__(self, inner: ActivationQuantizer, *, learn: bool) -> None:
        super().__init__(inner.qparams, learn=learn)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid; while `inner` observes it sees x, too."""
        if self.inner.observing:
            self.inner(x.detach().cpu())
        if not self.inner.enabled:
            return x
        count = x[:1].numel() // len(self.start) if x.dim() else 1
        return self.quantize(x, self.start * self.log_step.exp(), count)

    def refit(self) -> None:
        """The grid for what was observed; nothing changes where nothing was."""
        if self.inner.observing and self.inner.observer.minimum is not None:
            self.inner.freeze()
            self.take(self.inner.qparams)

    def frozen(self) -> ActivationQuantizer:
        """The plain quantizer with the grid that was found."""
        found = self._found(self.start * self.log_step.exp())
        found = replace(found, scale=found.scale.clamp(min=float(found.scale.amax()) / _FINEST))
        state = {name: getattr(found, name) for name in ("scale", "zero_point", "qmin", "qmax")}
        dtype = str(found.dtype).removeprefix("torch.")
        self.inner.set_extra_state({**state, "dtype": dtype, "axis": found.axis})
        return self.inner


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
        vars(module)["source"] for module in graph.modules() if isinstance(module, SimulatedForm)
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

    `trained` stays as it is. Weights whose codes a target refuses lose a bit, as at a compile.
    """
    graph = copy.deepcopy(trained).cpu().eval()
    graph.requires_grad_(False)
    paths = {id(module): path for path, module in graph.named_modules()}
    notes: dict[str, str] = {}
    for weight, quantizer, place in _weights(graph, TrainableWeight):
        qparams = quantizer.qparams(weight)
        narrow = max(abs(qparams.qmin), qparams.qmax) <= 64
        reason = "" if narrow or refusal is None else refusal(qparams.quantize(weight))
        if reason:
            qparams = _one_bit_less(qparams)
            path = paths[id(quantizer)].removesuffix(".weight_quantizer")
            notes[path] = f"{path}: weights in 7 bits after training, because {reason}"
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
