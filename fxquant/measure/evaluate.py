"""Accuracy of a model, and of a quantized model beside its float reference on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.errors import DataError, InputError, ModelError

Model = Callable[[Tensor], Any]
Batch = Tensor | Sequence[Any]


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
        return {name: _finite(value) for name, value in fields.items()}

    def __str__(self) -> str:
        rows = [("quantized" if self.reference else "model", self)]
        if self.reference is not None:
            rows.insert(0, ("float", self.reference))
        return tabulate(
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
            headers=("", "images", "top-1", "top-5", "loss", "agreement", "SQNR"),
            disable_numparse=True,
            colalign=("left", *["right"] * 6),
        )


def percent(share: float | None) -> str:
    """``0.7954`` as ``79.54 %``; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f} %"


def decibels(ratio: float | None) -> str:
    """``17.42`` as ``17.4 dB``; a dash for None."""
    return "-" if ratio is None else f"{ratio:.1f} dB"


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
    tally, reference_tally = _Tally(), _Tally()
    same = signal = noise = 0.0
    expected = _reference_logits(reference)
    with torch.inference_mode():
        for images, labels in _with_progress(batches, "evaluate", progress):
            logits = logits_of(model, images)
            _check_labels(labels, classes or logits.shape[1], tally.images, batches)
            tally.add(logits, labels)
            if expected is None:
                continue
            wanted = expected(images)
            if wanted.shape != logits.shape:
                raise InputError(
                    f"the reference's logits are {list(wanted.shape)} where the model's are "
                    f"{list(logits.shape)}; use the same batches and classes for both"
                )
            reference_tally.add(wanted, labels)
            same += float((wanted.argmax(1) == logits.argmax(1)).sum())
            signal += float(wanted.double().square().sum())
            noise += float((wanted.double() - logits.double()).square().sum())
    if not tally.images:
        raise DataError("there are no images to evaluate on: the batches are empty")
    if expected is None:
        return tally.result()
    return tally.result(same / tally.images, _decibels(signal, noise), reference_tally.result())


def collect_logits(
    model: Model, batches: Iterable[Batch], *, progress: bool = False
) -> list[Tensor]:
    """The logits [N, classes] of every batch: a `reference` for many evaluations of one study."""
    with torch.inference_mode():
        return [
            logits_of(model, images) for images, _ in _with_progress(batches, "float", progress)
        ]


def logits_of(model: Model, images: Tensor) -> Tensor:
    """The logits float[N, classes] that `model` gives for `images`.

    Raises:
        ModelError: the model is in training mode, or gives something else.
    """
    if isinstance(model, nn.Module) and model.training:
        raise ModelError("the model is in training mode; call model.eval() before evaluating it")
    output = model(images)
    logits = next(_tensors(output), None)
    if logits is None or logits.dim() != 2 or len(logits) != len(images):
        found = type(output).__name__ if logits is None else f"a tensor of {list(logits.shape)}"
        raise ModelError(f"the model gives {found}; evaluating needs logits [images, classes]")
    return logits


class _Tally:
    """Sums over the batches that have been seen."""

    def __init__(self) -> None:
        self.images = 0
        self.labelled = 0
        self.top1 = self.top5 = self.loss = 0.0

    def add(self, logits: Tensor, labels: Tensor | None) -> None:
        self.images += len(logits)
        if labels is None:
            return
        self.labelled += len(logits)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.unsqueeze(1)
        self.top1 += float(hits[:, 0].sum())
        self.top5 += float(hits.sum())
        self.loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))

    def result(
        self,
        agreement: float | None = None,
        sqnr_db: float | None = None,
        reference: Evaluation | None = None,
    ) -> Evaluation:
        sums = (self.top1, self.top5, self.loss)
        top1, top5, loss = (total / self.labelled if self.labelled else None for total in sums)
        return Evaluation(self.images, top1, top5, loss, agreement, sqnr_db, reference)


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


def _with_progress(
    batches: Iterable[Batch], description: str, progress: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    shown = tqdm(
        batches, description, delay=2, disable=None if progress else True, leave=False, unit="batch"
    )
    for batch in shown:
        if isinstance(batch, Tensor):
            yield batch, None
            continue
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
        if labels is None or bool((labels < 0).all()):
            yield images, None
        else:
            yield images, labels


def _check_labels(labels: Tensor | None, classes: int, seen: int, batches: Iterable[Batch]) -> None:
    if labels is None:
        return
    wrong = torch.nonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        index = int(wrong[0])
        names = getattr(getattr(batches, "images", None), "names", None)
        name = names[seen + index] if names else f"image {seen + index}"
        raise DataError(
            f"{name}: label {int(labels[index])} is out of range: the model has {classes} classes, "
            f"0 to {classes - 1}"
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
