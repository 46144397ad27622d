"""Accuracy of a model, and of a quantized model beside its float reference on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxquant.arguments import checked
from fxquant.errors import DataError, InputError, ModelError
from fxquant.measure.metric import Metric, as_metric
from fxquant.measure.tables import decibels, finite, percent, table
from fxquant.metrics import (
    Accuracy,
    Batch,
    Closeness,
    Model,
    check_batch,
    labelled_logits,
    logits_of,
    samples_of,
)

__all__ = ["Change", "Evaluation", "collect_logits", "evaluate"]


@dataclass(frozen=True)
class Change:
    """An image, by its number, for which the reference predicts another class.

    `label` is None where the images have none.
    """

    image: int
    reference: int
    found: int
    label: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """What a classifier reached on some images.

    Attributes:
        images: how many images were seen.
        top1, top5: shares in [0, 1] of the images whose label is among the highest one or five
            logits; None where the images have no labels.
        loss: mean cross entropy in nats; None where the images have no labels.
        agreement: share in [0, 1] of the images with the same argmax as the reference.
        sqnr_db: 10·log10(Σ r² / Σ (r − y)²) over all logits y of the model and r of the reference,
            in decibels; infinite where they are equal.
        reference: what the reference itself reached on the same images.
        metric: the value of the metric that was asked for, which stands for what a classifier is
            judged by: the other figures are None then.
        metric_name: of `metric`.
        drop: by how much `metric` is worse than the reference's; negative where it is better.
        changed: the images for which the reference predicts another class, in their order.
    """

    images: int
    top1: float | None
    top5: float | None
    loss: float | None
    agreement: float | None = None
    sqnr_db: float | None = None
    reference: Evaluation | None = None
    metric: float | None = None
    metric_name: str = ""
    drop: float | None = None
    changed: tuple[Change, ...] = ()

    @property
    def top1_drop(self) -> float | None:
        """Top-1 of the reference minus top-1 of the model, a share; None where either is not."""
        if self.reference is None or self.reference.top1 is None or self.top1 is None:
            return None
        return self.reference.top1 - self.top1

    def to_json(self) -> dict[str, Any]:
        """The fields and ``top1_drop``, ready for ``json.dumps``; what is not finite is None."""
        fields = asdict(self) | {"top1_drop": self.top1_drop}
        fields["reference"] = None if self.reference is None else self.reference.to_json()
        plain: dict[str, Any] = finite(fields)
        return plain

    def __str__(self) -> str:
        rows = [("quantized" if self.reference else "model", self)]
        if self.reference is not None:
            rows.insert(0, ("float", self.reference))
        if self.metric is not None:
            return table(
                [(name, row.images, f"{row.metric:.5g}") for name, row in rows],
                ("", "images", self.metric_name),
            )
        return table(
            [
                (
                    name,
                    row.images,
                    percent(row.top1),
                    percent(row.top5),
                    "-" if row.loss is None else f"{row.loss:.4f}",
                    percent(row.agreement),
                    decibels(row.sqnr_db),
                )
                for name, row in rows
            ],
            ("", "images", "top-1", "top-5", "loss", "agreement", "SQNR"),
        )


@checked(model=ModelError, batches=DataError, reference=ModelError)
def evaluate(
    model: Model,
    batches: Iterable[Batch],
    *,
    reference: Model | Sequence[Tensor] | None = None,
    classes: int | None = None,
    metric: Metric | Callable[..., Any] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run `model` on all batches and count what it gets right.

    Args:
        model: from an image tensor to logits [N, classes]; of an output with several tensors the
            first counts.
        batches: ``(images, labels int[N])`` tuples, or image tensors alone. A label below zero in
            all of a batch means that the batch has no labels.
        reference: a float model that runs on the same images, or its logits (`collect_logits`).
        classes: the labels' range; by default the number of logits.
        metric: judge by this instead, whatever the model returns: ``(model, batches) -> float`` or
            ``(outputs, targets) -> Tensor``, see `Metric`. The reference is a model then.
        progress: show a bar on stderr after two seconds.

    Raises:
        DataError: there are no batches, or a label is out of range (names the image).
        ModelError: a model is in training mode, or its output is not [N, classes].
        InputError: the reference's logits belong to other images, or the metric fails.
    """
    if metric is not None:
        return _by_metric(as_metric(metric), model, batches, reference, progress)
    accuracy, reference_accuracy, closeness = Accuracy(), Accuracy(), Closeness()
    expected = _reference_logits(reference)
    changed: list[Change] = []
    with torch.inference_mode():
        found = labelled_logits(model, batches, classes=classes, bar="evaluate" if progress else "")
        for images, logits, labels in found:
            accuracy.add(logits, labels)
            if expected is None:
                continue
            wanted = expected(images)
            if wanted.shape != logits.shape:
                raise InputError(
                    f"the reference's logits are {list(wanted.shape)} where the model's are "
                    f"{list(logits.shape)}; use the same batches and classes for both"
                )
            changed += _changes(wanted, logits, labels, reference_accuracy.images)
            reference_accuracy.add(wanted, labels)
            closeness.add(wanted, logits)
    if expected is None:
        return _evaluation(accuracy)
    return replace(
        _evaluation(accuracy),
        agreement=closeness.agreement,
        sqnr_db=closeness.sqnr_db,
        reference=_evaluation(reference_accuracy),
        changed=tuple(changed),
    )


@checked(model=ModelError, batches=DataError)
def collect_logits(
    model: Model, batches: Iterable[Batch], *, progress: bool = False
) -> list[Tensor]:
    """The logits [N, classes] of every batch: a `reference` for many evaluations of one study.

    Raises what `evaluate` raises for the batches and for the model.
    """
    with torch.inference_mode():
        found = labelled_logits(model, batches, bar="float" if progress else "")
        return [logits for _, logits, _ in found]


def _changes(
    reference: Tensor, found: Tensor, labels: Tensor | None, seen: int
) -> Iterator[Change]:
    before, after = reference.argmax(1), found.argmax(1)
    for index in torch.nonzero(before != after).flatten().tolist():
        label = None if labels is None else int(labels[index])
        yield Change(seen + index, int(before[index]), int(after[index]), label)


def _evaluation(of: Accuracy) -> Evaluation:
    return Evaluation(of.images, of.top1, of.top5, of.loss)


def _by_metric(
    metric: Metric,
    model: Model,
    batches: Iterable[Batch],
    reference: Model | Sequence[Tensor] | None,
    progress: bool,
) -> Evaluation:
    if reference is not None and not callable(reference):
        raise InputError("a metric judges models: give the float model as the reference")
    counted = _Counted(list(batches) if iter(batches) is batches else batches)
    of_reference = reference and metric(reference, counted, bar="float" if progress else "")
    value = metric(model, counted, bar="evaluate" if progress else "")
    found = Evaluation(counted.images, None, None, None, metric=value, metric_name=metric.name)
    if of_reference is None:
        return found
    return replace(
        found,
        reference=replace(found, metric=of_reference),
        drop=metric.drop(of_reference, value),
    )


class _Counted:
    """Batches, and how many images the last walk over them saw."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.images = 0

    def __iter__(self) -> Iterator[Batch]:
        self.images = 0
        for batch in self._batches:
            check_batch(batch)
            self.images += samples_of(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]


def _reference_logits(
    reference: Model | Sequence[Tensor] | None,
) -> Callable[[Tensor], Tensor] | None:
    if reference is None:
        return None
    if callable(reference):
        model: Model = reference
        return lambda images: logits_of(model, images)
    recorded = iter(reference)

    def replay(images: Tensor) -> Tensor:
        try:
            return next(recorded)
        except StopIteration:
            raise InputError("the reference has logits of fewer batches than there are") from None

    return replay
