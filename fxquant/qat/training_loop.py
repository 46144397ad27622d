"""The loop of quantization-aware training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxquant.backends import find_target
from fxquant.compiled import CompiledModel, with_simulated
from fxquant.errors import CalibrationError, DataError, ModelError, TrainingError
from fxquant.metrics import Accuracy, labelled_logits, labels_of
from fxquant.qat.quantizers import TrainableActivation, TrainableWeight
from fxquant.qat.trained_graph import batch_norms, to_simulated

__all__ = ["Loss", "Trainer"]

Loss = Callable[[Any, Any], Tensor]
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Trainer:
    """Trains `graph`, a trainable copy of q's simulated graph; see `finetune` for the fields."""

    q: CompiledModel
    graph: fx.GraphModule
    loss: Loss | None
    teacher: nn.Module | None
    distillation: float
    device: str
    learn_steps: bool
    freeze_observers_at: int
    freeze_batch_norm_at: int
    validation: Iterable[Any] | None
    best: fx.GraphModule | None = None
    best_top1: float = -1.0
    best_epoch: int = 0
    losses: list[float] = field(default_factory=list)

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for the optimizer: those of the model, and the logarithms of the steps."""
        steps = {id(module.log_step) for module in self._quantizers()}
        named = [parameter for parameter in self.graph.parameters() if parameter.requires_grad]
        model = [parameter for parameter in named if id(parameter) not in steps]
        if not model:
            raise ModelError("the model has no parameters to train")
        learned = [parameter for parameter in named if id(parameter) in steps]
        groups = [{"params": model}]
        # What decays a weight must not pull a step towards where it started.
        return [*groups, {"params": learned, "weight_decay": 0.0}] if learned else groups

    def run(
        self, loader: Iterable[Any], epochs: int, optimizer: torch.optim.Optimizer, progress: bool
    ) -> CompiledModel:
        """Train, and lower the best state, or the last one where nothing says which is best.

        Raises DataError for the data, TrainingError where the loss is NaN or infinite.
        """
        peaks = [group["lr"] for group in optimizer.param_groups]
        if self.validation is not None:
            self.best_top1 = self._top1()
        bar = tqdm(total=epochs, desc="finetune", delay=2, disable=not progress, unit="epoch")
        for epoch in range(epochs):
            self._set_mode(epoch)
            total, count = 0.0, 0
            length = _length(loader)
            for index, batch in enumerate(loader):
                done = (epoch + (index / length if length else 0.0)) / epochs
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
                value = self._step(batch, index, epoch, optimizer)
                total, count = total + value, count + 1
                bar.set_postfix(loss=f"{total / count:.4f}", refresh=False)
            if not count:
                raise DataError("there are no training batches: the loader is empty")
            self.losses.append(total / count)
            self._end_epoch(epoch)
            bar.update()
        bar.close()
        return self._compiled(self.best)

    # -- one epoch -------------------------------------------------------------------------

    def _quantizers(self) -> list[TrainableWeight | TrainableActivation]:
        kinds = (TrainableWeight, TrainableActivation)
        return [module for module in self.graph.modules() if isinstance(module, kinds)]

    def _set_mode(self, epoch: int) -> None:
        """What moves in this epoch."""
        self.graph.train()
        for norm in self.graph.modules():
            if isinstance(norm, _NORMS):
                norm.eval()
        if epoch < self.freeze_batch_norm_at:
            for norm in batch_norms(self.graph):
                norm.train()
        moving = epoch < self.freeze_observers_at
        for module in self._quantizers():
            if self.learn_steps:
                module.log_step.requires_grad_(moving)
                if not moving:
                    # An optimizer with momentum moves whatever has a gradient.
                    module.log_step.grad = None
            elif isinstance(module, TrainableActivation):
                module.inner.observing = moving

    def _step(self, batch: Any, index: int, epoch: int, optimizer: torch.optim.Optimizer) -> float:
        inputs, labels = self._split(batch, index)
        try:
            output = self.graph(*inputs)
        except CalibrationError as error:
            raise self._broken(f"epoch {epoch + 1}, batch {index}: {error}") from error
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"training batch {index} does not run through the model: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
        value = self._value(inputs, output, labels)
        found = float(value.detach())
        if not math.isfinite(found):
            raise self._broken(
                f"epoch {epoch + 1}, batch {index}: the loss is {found}; lower the learning rate"
            )
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return found

    def _split(self, batch: Any, index: int) -> tuple[list[Any], Any]:
        items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        wanted = len(self.q.example)
        if len(items) < wanted:
            raise DataError(
                f"training batch {index} holds {len(items)} values, the model takes {wanted}"
            )
        labels = labels_of(items, wanted)
        if self.loss is not None and labels is None:
            raise DataError(
                f"training batch {index} has no labels: give (inputs, labels) batches, or "
                "loss=None to learn from the teacher alone"
            )
        return [self._here(item) for item in items[:wanted]], self._here(labels)

    def _value(self, inputs: Sequence[Any], output: Any, labels: Any) -> Tensor:
        terms: list[Tensor] = []
        if self.loss is not None:
            try:
                terms.append(self.loss(output, labels))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise DataError(
                    "the loss does not take the model's output and these labels: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from error
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(*inputs)
            if not (isinstance(output, Tensor) and isinstance(wanted, Tensor) and wanted.dim() > 1):
                raise ModelError(
                    "distillation needs one tensor of logits [N, classes, ...] from the model "
                    "and from its teacher: pass teacher=None and a loss of your own"
                )
            divergence = F.kl_div(
                output.log_softmax(1), wanted.log_softmax(1), reduction="none", log_target=True
            )
            terms.append(self.distillation * divergence.sum(1).mean())
        return torch.stack(terms).sum()

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _end_epoch(self, epoch: int) -> None:
        for module in self._quantizers():
            if isinstance(module, TrainableActivation) and module.inner.observing:
                module.refit()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.graph.parameters()):
            raise self._broken(
                f"the last step of epoch {epoch + 1} left NaN or infinite weights; lower the "
                "learning rate"
            )
        top1 = self._top1() if self.validation is not None else 0.0
        if self.validation is None or top1 > self.best_top1:
            self.best_top1, self.best_epoch = top1, epoch + 1
            self.best = copy.deepcopy(self.graph)

    def _top1(self) -> float:
        assert self.validation is not None
        self.graph.eval()
        accuracy = Accuracy()
        with torch.inference_mode():
            for _, logits, labels in labelled_logits(
                lambda x: self.graph(self._here(x)).cpu(), self.validation
            ):
                accuracy.add(logits, labels)
        if accuracy.top1 is None:
            raise DataError("the validation batches have no labels: give (inputs, labels)")
        return accuracy.top1

    # -- what comes of it --------------------------------------------------------------------

    def _broken(self, message: str) -> TrainingError:
        kept = f"of epoch {self.best_epoch}" if self.best is not None else "before the training"
        return TrainingError(
            f"{message} (the state {kept} is this error's `best`)", self._compiled(self.best)
        )

    def _compiled(self, trained: fx.GraphModule | None) -> CompiledModel:
        """`q` with the trained graph in place of its simulated one; `q` itself where none is."""
        if trained is None:
            return self.q
        refusal = find_target(self.q.target).weight_refusal()
        simulated, notes = to_simulated(trained, refusal=refusal)
        return with_simulated(self.q, simulated, (*notes.values(), self._note()))

    def _note(self) -> str:
        seen = self.losses[: self.best_epoch]
        steps = "learned steps" if self.learn_steps else "observed grids"
        chosen = f", top-1 {self.best_top1:.2%}" if self.validation is not None else ""
        return (
            f"finetuned for {self.best_epoch} epochs with {steps}: loss {seen[0]:.4f} -> "
            f"{seen[-1]:.4f}{chosen}"
        )


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:
        return 0
