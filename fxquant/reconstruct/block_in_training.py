"""A block in training: learned roundings and steps in the place of fixed quantizers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxquant.reconstruct.convolutions import has_fast_bfloat16, use_bfloat16
from fxquant.reconstruct.subgraph import Subgraph, trainable_layers
from fxquant.simulate.quantizers import (
    ActivationQuantizer,
    AffineQuantizer,
    RoundedWeightQuantizer,
    WeightQuantizer,
)
from fxquant.simulate.quantizers.learned_rounding import LearnedRounding
from fxquant.simulate.quantizers.learned_step import LearnedStep, can_learn
from fxquant.simulate.quantizers.straight_through import memory_format

__all__ = ["BlockInTraining", "on_device"]


class BlockInTraining:
    """A copy of a part of the simulated graph whose quantizers learn.

    Args:
        part: the part; its modules stay as they are.
        steps: paths of the activation quantizers whose steps may be learned.
        drop: probability that an activation stays float in training (QDrop).
        device: where it computes.
        bfloat16: whether its convolutions may multiply in bfloat16.
    """

    def __init__(
        self,
        part: Subgraph,
        steps: Collection[str],
        drop: float,
        device: torch.device,
        *,
        bfloat16: bool = False,
    ) -> None:
        self.module = on_device(part.module, device)
        if bfloat16 and has_fast_bfloat16(device):
            use_bfloat16(self.module)
        self.inputs = part.inputs
        self.roundings: dict[str, LearnedRounding] = {}
        self.steps: dict[str, LearnedStep] = {}
        for path, layer in trainable_layers(self.module).items():
            quantizer = layer.weight_quantizer
            assert isinstance(quantizer, WeightQuantizer)
            weight: Any = layer.layer.weight
            codes = quantizer.codes if isinstance(quantizer, RoundedWeightQuantizer) else None
            rounding = LearnedRounding(quantizer.qparams, weight, codes).to(device)
            self.roundings[path] = rounding
            layer.weight_quantizer = rounding
        for path in steps:
            quantizer = self.module.get_submodule(path)
            if can_learn(quantizer):
                self.steps[path] = LearnedStep(cast(ActivationQuantizer, quantizer)).to(device)
                self.module.set_submodule(path, self.steps[path])
        self.drop = _Drop(drop, torch.Generator(device))
        self.mixed: tuple[str, ...] = ()
        if drop:
            self.mixed = _insert_drops(self.module, self.drop)

    def __call__(self, inputs: dict[str, Tensor], floats: dict[str, Tensor]) -> Tensor:
        """The block's output: quantized inputs by name, and float ones for what is dropped."""
        values = [inputs[name] for name in self.inputs]
        return cast(Tensor, self.module(*values, *(floats[name] for name in self.mixed)))

    @contextmanager
    def dropping(self, batch: int, positions: Tensor, seed: int) -> Iterator[None]:
        """Inside, values are dropped; the inputs are these positions of a batch."""
        self.drop.batch, self.drop.positions = batch, positions
        self.drop.generator.manual_seed(seed)
        try:
            yield
        finally:
            self.drop.positions = None

    def learn_steps(self, learn: bool) -> None:
        """Whether gradients of the steps are computed at all."""
        for step in self.steps.values():
            step.scale.requires_grad_(learn)

    def harden(self) -> None:
        """Fix the roundings as they would be decided now."""
        for path, layer in trainable_layers(self.module).items():
            fixed = self.roundings[path].harden().to(self.roundings[path].V.device)
            layer.weight_quantizer = fixed
            _move_grids(fixed, self.roundings[path].V.device)


def on_device(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy on a device, of which nothing wants a gradient."""
    made = copy.deepcopy(module).to(device).requires_grad_(False)
    _move_grids(made, device)
    return made


def _move_grids(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        if isinstance(part, AffineQuantizer) and part.has_qparams:
            part._qparams = part.qparams.to(device)


class _Drop(nn.Module):
    """Elementwise, with a probability, the float value instead of the quantized one."""

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.threshold = round(probability * 256)  # of a byte
        self.generator = generator
        self.batch = 0
        self.positions: Tensor | None = None

    def forward(self, quantized: Tensor, value: Tensor) -> Tensor:
        if self.positions is None or not self.threshold:
            return quantized
        # Drawn for the whole batch, so that every process drops what one process would.
        rows = quantized.shape[0] // max(1, len(self.positions))
        shape = (self.batch, rows, *quantized.shape[1:])
        drawn = _random_bytes(shape, self.generator)[self.positions].view(quantized.shape)
        return cast(Tensor, _Mix.apply(quantized, value, drawn > self.threshold - 1))


class _Mix(torch.autograd.Function):
    """The quantized value where `keep` is true, else the float one; gradients go the same way.

    `torch.where` with its gradients takes eight times as long on a CPU. Multiplying by 0 and 1 is
    as exact.
    """

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        share = keep.to(quantized.dtype, memory_format=memory_format(quantized))
        ctx.save_for_backward(share)
        return torch.lerp(value, quantized, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        kept = gradient * ctx.saved_tensors[0]
        return kept, gradient - kept if ctx.needs_input_grad[1] else None, None


def _random_bytes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:count].view(shape)


def _insert_drops(module: fx.GraphModule, drop: _Drop) -> tuple[str, ...]:
    """Mix float values into what quantizers yield; the names of the float inputs it now takes.

    The block's own inputs are mixed with those of the float network.
    """
    module.add_submodule("drop", drop)
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    floats: dict[fx.Node, fx.Node] = {}
    for node in placeholders:
        if node.meta["tensor"].dtype.is_floating_point:
            with graph.inserting_after(
                placeholders[-1] if not floats else list(floats.values())[-1]
            ):
                floats[node] = graph.placeholder(f"{node.name}_float")
    for node in list(graph.nodes):
        readers = [user for user in node.users if not _reads_as_it_is(user, module)]
        if node in floats:
            value = floats[node]
        elif _is_quantizer(node, module):
            source = node.all_input_nodes[0]
            value = floats.get(source, source)
        else:
            continue
        if not readers:
            continue
        position = list(floats.values())[-1] if node in floats else node
        with graph.inserting_after(position):
            mixed = graph.call_module("drop", (node, value))
        for user in readers:
            user.replace_input_with(node, mixed)
    graph.lint()
    module.recompile()
    return tuple(node.name for node in floats)


def _is_quantizer(node: fx.Node, module: fx.GraphModule) -> bool:
    return node.op == "call_module" and isinstance(
        module.get_submodule(str(node.target)), (ActivationQuantizer, LearnedStep)
    )


def _reads_as_it_is(user: fx.Node, module: fx.GraphModule) -> bool:
    """Quantizers mix behind themselves; sizes are no values."""
    if user.op == "call_function" and getattr(user.target, "__name__", "") == "_size":
        return True
    return _is_quantizer(user, module) or user.target == "drop"
