"""How close outputs are to a reference, and what a classifier gets right: sums over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.errors import DataError, FxquantError, ModelError
from passes.infra.verify import flatten

__all__ = [
    "Accuracy",
    "Batch",
    "Closeness",
    "Model",
    "check_batch",
    "first_tensor",
    "labelled_logits",
    "labels_of",
    "logits_of",
    "normalized_mean_error",
    "outputs_of",
]

Model = Callable[[Tensor], Any]
Batch = Tensor | Sequence[Any]


class Closeness:
    """Outputs y against those of a reference r, over all batches that `add` saw."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.rows = self.same = 0
        self.classifies = True

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Take in a batch of outputs, both of one shape, of any dtype."""
        wanted, got = reference.double(), found.double()
        self.signal += float(wanted.square().sum())
        self.noise += float((wanted - got).square().sum())
        self.classifies &= wanted.dim() == 2
        if self.classifies:
            self.rows += len(wanted)
            self.same += int((wanted.argmax(1) == got.argmax(1)).sum())

    @property
    def sqnr_db(self) -> float:
        """10·log10(Σ r² / Σ (r − y)²) in decibels; infinite where all values are equal.

        Minus infinity where the reference is 0 throughout, or a value is infinite or NaN.
        """
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf

    @property
    def agreement(self) -> float | None:
        """Share in [0, 1] of the rows with the same argmax; None unless all were [N, classes]."""
        return self.same / self.rows if self.classifies and self.rows else None


class Accuracy:
    """Top-1, top-5 and cross entropy over all batches that `add` saw.

    `top1` and `top5` are shares in [0, 1] of the labelled images whose label is among the highest
    one or five logits, `loss` is the mean cross entropy in nats; None without labels.
    """

    def __init__(self) -> None:
        self.images = self.labelled = 0
        self._hits = self._near_hits = self._loss = 0.0

    def add(self, logits: Tensor, labels: Tensor | None) -> None:
        """Take in logits [N, classes], and labels int[N] where there are any."""
        self.images += len(logits)
        if labels is None:
            return
        self.labelled += len(logits)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.unsqueeze(1)
        self._hits += float(hits[:, 0].sum())
        self._near_hits += float(hits.sum())
        self._loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))

    @property
    def top1(self) -> float | None:
        """See the class."""
        return self._mean(self._hits)

    @property
    def top5(self) -> float | None:
        """See the class."""
        return self._mean(self._near_hits)

    @property
    def loss(self) -> float | None:
        """See the class."""
        return self._mean(self._loss)

    def _mean(self, total: float) -> float | None:
        return total / self.labelled if self.labelled else None


def labelled_logits(
    model: Model, batches: Iterable[Batch], *, classes: int | None = None, bar: str = ""
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images, logits [N, classes] and labels int[N] or None of every batch.

    Args:
        model: as for `logits_of`.
        batches: ``(images, labels)`` tuples, or image tensors alone; see `labels_of`.
        classes: the labels' range; by default the number of logits.
        bar: the name of a progress bar, which stderr shows after two seconds; "" shows none.

    Raises:
        DataError: there are no batches, or a label is out of range (names the image).
        ModelError: as `logits_of` does.
    """
    seen = 0
    shown = tqdm(batches, bar, delay=2, disable=None if bar else True, leave=False, unit="batch")
    for batch in shown:
        check_batch(batch)
        images = batch if isinstance(batch, Tensor) else batch[0]
        labels = labels_of(batch)
        logits = logits_of(model, images)
        if labels is not None:
            _check_labels(labels, len(logits), classes or logits.shape[1], seen, batches)
        seen += len(logits)
        yield images, logits, labels
    if not seen:
        raise DataError("there are no images to evaluate on: the batches are empty")


def labels_of(batch: Any, inputs: int = 1) -> Any:
    """What stands behind the first `inputs` values of a batch, or None.

    Integer labels that are all below zero mean that there are none.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) <= inputs:
        return None
    labels = batch[inputs]
    if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels < 0).all()):
        return None
    return labels


def logits_of(model: Model, images: Tensor) -> Tensor:
    """The logits [N, classes] that `model` gives for `images`, its output's first tensor.

    Raises:
        ModelError: the model is in training mode, or gives something else.
    """
    if isinstance(model, nn.Module) and model.training:
        raise ModelError("the model is in training mode; call model.eval() before evaluating it")
    output = outputs_of(model, images)
    logits = next((value for _, value in flatten(output) if isinstance(value, Tensor)), None)
    count = len(images) if isinstance(images, Tensor) else None
    if logits is None or logits.dim() != 2 or count not in (None, len(logits)):
        found = type(output).__name__ if logits is None else f"a tensor of {list(logits.shape)}"
        raise ModelError(f"the model gives {found}; evaluating needs logits [images, classes]")
    return logits


def normalized_mean_error(first: int, second: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The error of landmarks, as a metric of `fxquant.evaluate`: smaller is better.

    The mean distance between a landmark and where it is said to be, divided by the distance
    between two landmarks of the same face: the eyes' outer corners ("inter-ocular", Sagonas et
    al., 300 Faces in-the-Wild, 2013) or the pupils.

    Args:
        first, second: the numbers of the two landmarks.

    Returns:
        A function of outputs and targets, float[N, K, 2] or float[N, 2K] with x and y in turn,
        that gives the error of each image, float[N].

    Raises:
        DataError: by the function, where the shapes differ or there is no such landmark.
    """

    def errors(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape or outputs[:1].numel() <= 2 * max(first, second) + 1:
            raise DataError(
                f"landmarks are [N, K, 2] or [N, 2K] with K above {max(first, second)}: the "
                f"outputs are {list(outputs.shape)}, the targets {list(targets.shape)}"
            )
        found, wanted = (value.reshape(len(value), -1, 2) for value in (outputs, targets))
        between = (wanted[:, first] - wanted[:, second]).norm(dim=1)
        error: Tensor = (found - wanted).norm(dim=2).mean(1) / between
        return error

    return errors


def outputs_of(model: Callable[..., Any], *inputs: Any) -> Any:
    """What `model` gives for `inputs`. Raises ModelError where it fails."""
    try:
        return model(*inputs)
    except FxquantError:
        raise
    except Exception as error:
        shapes = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(
            f"the model does not run on {', '.join(map(str, shapes))}: {problem}"
        ) from error


def check_batch(batch: Any) -> None:
    """Raise DataError for what is neither a tensor nor ``(inputs, ...)``."""
    if not isinstance(batch, Tensor) and not (isinstance(batch, (tuple, list)) and batch):
        raise DataError(
            f"a batch is a {type(batch).__name__}: give tensors, or tuples (inputs, labels)"
        )


def samples_of(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    first = next((value for _, value in flatten(batch) if isinstance(value, Tensor)), None)
    return len(first) if first is not None and first.dim() else 1


def first_tensor(output: Any) -> Tensor:
    """The first float tensor of an output. Raises ModelError where there is none."""
    for _, value in flatten(output):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ModelError("the model's output holds no float tensor to measure")


def _check_labels(
    labels: Any, images: int, classes: int, seen: int, batches: Iterable[Batch]
) -> None:
    integers = isinstance(labels, Tensor) and not labels.is_floating_point()
    if not integers or labels.shape != (images,):
        found = f"{labels.dtype}{list(labels.shape)}" if isinstance(labels, Tensor) else labels
        raise DataError(
            f"the labels of a batch of {images} images are {str(found)[:40]!r}: expected "
            f"{images} integers"
        )
    wrong = torch.nonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        index = int(wrong[0])
        names = getattr(getattr(batches, "images", None), "names", None)
        name = names[seen + index] if names else f"image {seen + index}"
        raise DataError(
            f"{name}: label {int(labels[index])} is out of range: the model has {classes} classes, "
            f"0 to {classes - 1}"
        )
