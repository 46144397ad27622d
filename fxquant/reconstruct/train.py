"""One block: Adam on the roundings and the steps until the block's output is its target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxquant.errors import CompileError
from fxquant.recipe import ReconstructionRecipe
from fxquant.reconstruct.block_in_training import BlockInTraining
from fxquant.reconstruct.caches import Rows
from fxquant.reconstruct.method import Method, Objective
from fxquant.reconstruct.parallel import Share
from fxquant.reconstruct.schedule import beta

__all__ = ["BlockData", "BlockResult", "train_block"]

_SETTLED_AT = 1e-5  # the mean regularizer of a rounding below which training stops
_REFRESH = 25  # iterations between two updates of the progress bar
# The share of a step size that an iteration may change in the adaptive schedule, whose short runs
# with their larger learning rates need it on finely quantized values.
_STEP_LIMIT = 2e-3


@dataclass(frozen=True)
class BlockData:
    """What a block is trained on, as cached rows of the images of this process.

    Attributes:
        images: of all processes together.
        inputs: values of the simulated network so far; `floats`: of the float network.
        objective: the error of the block's output, summed over some images.
        prediction: an error beside it, of the output with nothing dropped.
    """

    images: int
    inputs: Mapping[str, Rows]
    floats: Mapping[str, Rows]
    objective: Objective
    prediction: Objective | None = None


@dataclass(frozen=True)
class BlockResult:
    """How a training went: the last error per image, and the share of settled roundings."""

    iterations: int
    error: float
    settled: float


def train_block(
    name: str,
    block: BlockInTraining,
    data: BlockData,
    method: Method,
    share: Share,
    *,
    device: torch.device,
    seed: int,
    progress: bool = False,
) -> BlockResult:
    """Train the roundings, and the steps where they are asked for, of one block in place.

    Minimizes the mean of the method's objective over the images of a batch plus λ times the
    regularizer of all roundings. Ends early when the mean regularizer of a rounding is below 1e-5:
    all are decided.

    Raises:
        CompileError: the loss is not finite; names the block.
    """
    loop = _Loop(name, block, data, method, share, device, seed)
    jointly = method.settings.steps == "jointly"
    total = method.settings.iterations + (method.step_iterations if block.steps else 0)
    with tqdm(total=total, desc=name, disable=not progress, leave=False, unit="it") as bar:
        block.learn_steps(jointly)
        result = loop.train_roundings(bar, with_steps=jointly)
        if block.steps and method.step_iterations:
            block.harden()
            block.learn_steps(True)
            loop.train_steps(bar)
    return result


class _Loop:
    def __init__(
        self,
        name: str,
        block: BlockInTraining,
        data: BlockData,
        method: Method,
        share: Share,
        device: torch.device,
        seed: int,
    ) -> None:
        self.name, self.block, self.data, self.method = name, block, data, method
        self.settings, self.share, self.device = method.settings, share, device
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = min(self.settings.batch_size, data.images)
        self.roundings = list(block.roundings.values())
        self.count = sum(rounding.V.numel() for rounding in self.roundings)

    def train_roundings(self, bar: Any, *, with_steps: bool) -> BlockResult:
        settings = self.settings
        variables = [rounding.V for rounding in self.roundings]
        adam = torch.optim.Adam(variables, lr=settings.learning_rate, fused=True)
        steps = self._step_optimizer(settings.iterations) if with_steps else None
        parameters = variables + (steps.parameters if steps else [])
        error, iteration = 0.0, 0
        for iteration in range(settings.iterations):
            loss, gradients = self._gradients(parameters, dropping=True)
            exponent = beta(settings, iteration)
            regularizer = (
                None if exponent is None else self._regularize(gradients, variables, exponent)
            )
            self.share.sum([*gradients, loss])
            error = self._check(loss, iteration)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            adam.step()
            if steps is not None:
                steps.step(iteration)
            if iteration % _REFRESH == 0:
                self._show(bar, iteration, error, regularizer)
            if regularizer is not None and regularizer < _SETTLED_AT * self.count:
                break
        self._check_finite(parameters)
        bar.update(iteration + 1 - bar.n)
        settled = sum(rounding.settled() for rounding in self.roundings) / max(1, self.count)
        return BlockResult(iteration + 1, error, settled)

    def train_steps(self, bar: Any) -> None:
        steps = self._step_optimizer(self.method.step_iterations)
        for iteration in range(self.method.step_iterations):
            loss, gradients = self._gradients(steps.parameters, dropping=False)
            self.share.sum([*gradients, loss])
            error = self._check(loss, iteration)
            for parameter, gradient in zip(steps.parameters, gradients, strict=True):
                parameter.grad = gradient
            steps.step(iteration)
            if iteration % _REFRESH == 0:
                bar.set_postfix(step_error=f"{error:.3g}", refresh=False)
                bar.update(_REFRESH if iteration else 0)
        self._check_finite(steps.parameters)

    # -- an iteration ------------------------------------------------------------------------

    def _gradients(self, parameters: list[Any], *, dropping: bool) -> tuple[Tensor, list[Tensor]]:
        """This process's part of the loss of a batch, [1], and of its gradients."""
        drawn = torch.randperm(self.data.images, generator=self.generator)[: self.batch]
        positions, rows = self.share.own(drawn)
        dropping = dropping and self.block.drop.threshold > 0
        seed = int(torch.randint(2**62, (), generator=self.generator)) if dropping else 0
        if not len(rows):
            return torch.zeros(1, device=self.device), [torch.zeros_like(p) for p in parameters]
        if dropping:
            with self.block.dropping(self.batch, positions.to(self.device), seed):
                y = self._run(rows)
        else:
            y = self._run(rows)
        loss = self.data.objective(y, rows) / self.batch
        if self.data.prediction is not None:
            whole = self._run(rows) if dropping else y
            loss = loss + self.data.prediction(whole, rows) / self.batch
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return loss.detach().reshape(1), gradients

    def _run(self, rows: Tensor) -> Tensor:
        data, block = self.data, self.block
        inputs = {name: self._take(data.inputs[name], rows) for name in block.inputs}
        floats = {name: self._take(data.floats[name], rows) for name in block.mixed}
        return block(inputs, floats)

    def _take(self, part: Rows, rows: Tensor) -> Tensor:
        return part.take(rows).to(self.device)

    def _regularize(self, gradients: list[Tensor], variables: list[Any], exponent: float) -> float:
        """Add this process's part of the regularizer's gradient; returns the whole sum."""
        total = 0.0
        scale = self.settings.regularizer / self.share.size
        for index, rounding in enumerate(self.roundings):
            value = rounding.regularizer(exponent)
            (slope,) = torch.autograd.grad(value, variables[index])
            gradients[index] = gradients[index].add(slope, alpha=scale)
            total += float(value.detach())
        return total

    def _step_optimizer(self, iterations: int) -> _Steps:
        return _Steps(self.block, self.settings, iterations)

    # -- checks and progress -------------------------------------------------------------------

    def _check(self, loss: Tensor, iteration: int) -> float:
        value = float(loss)
        if math.isfinite(value):
            return value
        raise CompileError(
            f"reconstruction of block {self.name}: the loss is {value} at iteration {iteration}; "
            "the blocks before it are done, this one keeps its rounding: look at its values or "
            "lower reconstruction.learning_rate"
        )

    def _check_finite(self, parameters: list[Any]) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise CompileError(
                f"reconstruction of block {self.name}: what is learned is no longer finite; the "
                "blocks before it are done, this one keeps its rounding: lower "
                "reconstruction.learning_rate"
            )

    def _show(self, bar: Any, iteration: int, error: float, regularizer: float | None) -> None:
        if bar.disable:
            return
        settled = sum(rounding.settled() for rounding in self.roundings) / max(1, self.count)
        per_weight = 1.0 if regularizer is None else regularizer / max(1, self.count)
        bar.set_postfix(
            error=f"{error:.3g}", reg=f"{per_weight:.2g}", settled=f"{settled:.0%}", refresh=False
        )
        bar.update(iteration - bar.n)


class _Steps:
    """Adam for the step sizes, with a learning rate that falls as a cosine to 0."""

    def __init__(
        self, block: BlockInTraining, settings: ReconstructionRecipe, iterations: int
    ) -> None:
        self.steps = list(block.steps.values())
        self.parameters: list[Any] = [step.scale for step in self.steps]
        self.rates = []
        for step in self.steps:
            rate = settings.scale_learning_rate
            if settings.schedule == "adaptive":
                rate = min(rate, _STEP_LIMIT * float(step.scale.detach()))
            self.rates.append(rate)
        groups = [
            {"params": [parameter], "lr": rate}
            for parameter, rate in zip(self.parameters, self.rates, strict=True)
        ]
        self.adam = torch.optim.Adam(groups) if groups else None
        self.iterations = max(1, iterations)

    def step(self, iteration: int) -> None:
        if self.adam is None:
            return
        factor = 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.adam.step()
        for step in self.steps:
            step.follow()
