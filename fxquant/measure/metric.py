"""What a model is judged by: a number of one's own, larger or smaller is better."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.arguments import checked_class
from fxquant.errors import DataError, FxquantError, InputError, ModelError
from fxquant.measure.paired import Judged
from fxquant.metrics import check_batch, labels_of, outputs_of, samples_of

__all__ = ["TOP1", "Metric", "as_metric"]

_MODEL_NAMES = ("model", "net", "network", "module")
_OUTPUT_NAMES = (
    "output", "outputs", "out", "logits", "pred", "preds", "prediction", "predictions", "y_pred",
    "y_hat", "input", "inputs", "scores",
)  # fmt: skip


@checked_class
@dataclass(frozen=True)
class Metric:
    """A function that judges a model, and how to read what it says.

    `function` is ``(model, batches) -> float``, which runs the model itself (detection mAP, a
    model of several inputs), or ``(outputs, targets) -> Tensor``, which judges one batch: a value
    for each sample, whose mean is taken, or one value for the batch, which counts as often as the
    batch has samples. Which of the two it is follows from the annotation or the name of its first
    parameter, or from `per_batch`. `outputs` is what the model returns, `targets` what stands
    behind the inputs in a batch: a value, or a tuple of several. `larger_is_better`: what an
    improvement is. `name` and `unit` are for reports.

    Raises InputError where the function does not say which of the two it is.
    """

    function: Callable[..., Any]
    larger_is_better: bool = True
    per_batch: bool | None = None
    name: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            name = getattr(self.function, "__name__", type(self.function).__name__)
            object.__setattr__(self, "name", name)
        if self.per_batch is None:
            object.__setattr__(self, "per_batch", self._judges_batches())

    def __call__(
        self, model: Callable[..., Any], batches: Iterable[Any], *, bar: str = "", inputs: int = 1
    ) -> float:
        """The metric of `model` on `batches`, whose first `inputs` values the model takes.

        Raises DataError where there are no batches or no targets, ModelError for a model in
        training mode, InputError where the function fails or gives no number.
        """
        return self.judge(model, batches, bar=bar, inputs=inputs).value

    def judge(
        self, model: Callable[..., Any], batches: Iterable[Any], *, bar: str = "", inputs: int = 1
    ) -> Judged:
        """The metric with what it is the mean of; raises what a call raises."""
        if isinstance(model, nn.Module) and model.training:
            raise ModelError("the model is in training mode; call model.eval() before measuring it")
        if not self.per_batch:
            with torch.no_grad():
                return Judged(self._number(self._called(model, batches)))
        disable = None if bar else True
        walk = tqdm(batches, bar, delay=2, disable=disable, leave=False, unit="batch")
        found = [self._of_batch(model, batch, inputs) for batch in walk]
        if not any(len(weights) for _, weights in found):
            raise DataError("there is nothing to measure on: the batches are empty")
        samples, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Judged(float((samples * weights).sum() / weights.sum()), samples, weights)

    def drop(self, reference: float, found: float) -> float:
        """By how much `found` is worse than `reference`; negative where it is better."""
        return reference - found if self.larger_is_better else found - reference

    def words(self, value: float) -> str:
        """The value as reports write it."""
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.5g}"

    def _of_batch(
        self, model: Callable[..., Any], batch: Any, inputs: int
    ) -> tuple[Tensor, Tensor]:
        """The values of a batch, and how many samples each stands for."""
        check_batch(batch)
        targets = labels_of(batch, inputs)
        if targets is None:
            raise DataError(
                f"metric {self.name} needs targets: give batches of (inputs, targets), here there "
                f"is nothing behind the {inputs} inputs"
            )
        if len(batch) > inputs + 1:
            targets = tuple(batch[inputs:])
        with torch.no_grad():
            found = self._called(outputs_of(model, *batch[:inputs]), targets)
        size = samples_of(batch)
        if isinstance(found, Tensor) and found.dim() == 1 and len(found) == size:
            values = found.detach().double().cpu()
            self._number(values.sum())
            return values, torch.ones(size, dtype=torch.float64)
        return (
            torch.tensor([self._number(found)], dtype=torch.float64),
            torch.tensor([size], dtype=torch.float64),
        )

    def _called(self, *arguments: Any) -> Any:
        try:
            return self.function(*arguments)
        except FxquantError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(f"metric {self.name} failed: {problem}") from error

    def _number(self, found: Any) -> float:
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = f"a tensor of {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise InputError(
                f"metric {self.name} gives {kind}; expected one number, or a number a sample"
            ) from error
        if value != value:
            raise InputError(f"metric {self.name} gives NaN")
        return value

    def _judges_batches(self) -> bool:
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        first = parameters[0] if parameters else None
        if first is not None:
            annotation = str(first.annotation)
            if "Module" in annotation or "Model" in annotation or first.name in _MODEL_NAMES:
                return False
            if "Tensor" in annotation or first.name in _OUTPUT_NAMES:
                return True
        raise InputError(
            f"metric {self.name}: call its first parameter `model` where it takes (model, batches),"
            " `outputs` where it takes (outputs, targets), or give fxquant.Metric(function, "
            "per_batch=...)"
        )


def as_metric(given: Metric | Callable[..., Any] | None) -> Metric:
    """A metric as it is, a function as one whose larger values are better, None as top-1."""
    if given is None:
        return TOP1
    return given if isinstance(given, Metric) else Metric(given)


def _right(outputs: Any, targets: Any) -> Tensor:
    """100 for each sample whose label has the highest logit, else 0."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ModelError(
            f"top-1 needs logits [samples, classes], the model gives {found}: give metric="
        )
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        raise DataError("top-1 needs integer labels [samples] behind the inputs: give metric=")
    return (outputs.argmax(1) == targets).double() * 100


TOP1 = Metric(_right, per_batch=True, name="top-1", unit="%")
