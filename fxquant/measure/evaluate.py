"""Accuracy of a model, and of a quantized model beside its float reference on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InputError
from fxquant.measure.tables import decibels, finite, percent, table
from fxquant.metrics import Accuracy, Batch, Closeness, Model, labelled_logits, logits_of

__all__ = ["Evaluation", "collect_logits", "evaluate"]


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
    """

    images: int
    top1: float | None
    top5: float | None
    loss: float | None
    agreement: float | None = None
    sqnr_db: float | None = None
    reference: Evaluation | None = None

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


def evaluate(
    model: Model,
    batches: Iterable[Batch],
    *,
    reference: Model | Sequence[Tensor] | None = None,
    classes: int | None = None,
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
        progress: show a bar on stderr after two seconds.

    Raises:
        DataError: there are no batches, or a label is out of range (names the image).
        ModelError: a model is in training mode, or its output is not [N, classes].
        InputError: the reference's logits belong to other images.
    """
    accuracy, reference_accuracy, closeness = Accuracy(), Accuracy(), Closeness()
    expected = _reference_logits(reference)
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
            reference_accuracy.add(wanted, labels)
            closeness.add(wanted, logits)
    if expected is None:
        return _evaluation(accuracy)
    return replace(
        _evaluation(accuracy),
        agreement=closeness.agreement,
        sqnr_db=closeness.sqnr_db,
        reference=_evaluation(reference_accuracy),
    )


def collect_logits(
    model: Model, batches: Iterable[Batch], *, progress: bool = False
) -> list[Tensor]:
    """The logits [N, classes] of every batch: a `reference` for many evaluations of one study.

    Raises what `evaluate` raises for the batches and for the model.
    """
    with torch.inference_mode():
        found = labelled_logits(model, batches, bar="float" if progress else "")
        return [logits for _, logits, _ in found]


def _evaluation(of: Accuracy) -> Evaluation:
    return Evaluation(of.images, of.top1, of.top5, of.loss)


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
