"""Calibration data in all their forms as batches of a model's arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.data.batches import ImageBatches
from fxquant.errors import CalibrationError, InputError
from fxquant.frontend.inputs import bind, bind_by
from fxquant.frontend.structure import Names, is_container, names_of

__all__ = ["CalibrationSet"]

_CHUNK = 32  # a tensor handed over as a whole is fed in batches of this many images


class CalibrationSet:
    """Calibration data as batches of positional arguments for the model.

    `source` is a tensor, a DataLoader, or an iterable of tensors, of tuples (whose items beyond
    what `forward` of `model` takes are labels and are ignored) or of dicts by the names of its
    parameters. One-shot iterators are read once, or kept in memory where `sweeps` says that they
    are read again; `first` peeks at the first batch without losing it, `names` are the parameters
    that a batch feeds, `seen` is how many samples were read at most, and `preprocessing` what
    images of a folder went through. Inputs that are containers of tensors are taken apart, as
    `names` says or as the first batch has them.

    Raises CalibrationError for empty data, for batches that are no tensors, and where what is
    behind the needed inputs may be a label or an optional input.
    """

    def __init__(
        self,
        source: Any,
        *,
        model: nn.Module,
        images: int | None = None,
        sweeps: int = 1,
        names: Names | None = None,
    ) -> None:
        if isinstance(source, (Mapping, str, bytes)):
            raise CalibrationError(
                f"calibration is a {type(source).__name__}: give an iterable of tensors or of "
                "tuples of tensors, a DataLoader, or a tensor"
            )
        if isinstance(source, Tensor):
            source = torch.split(source, _CHUNK) if source.dim() else []
        if not isinstance(source, Iterable):
            raise CalibrationError(
                f"calibration is a {type(source).__name__}, which cannot be iterated: give an "
                "iterable of tensors or of tuples of tensors, a DataLoader, or a tensor"
            )
        self._model = model
        self._labels_behind = isinstance(source, ImageBatches)
        self.preprocessing = source.preprocessing if isinstance(source, ImageBatches) else None
        self.seen = 0
        self._bound = False
        self.names: tuple[str, ...] = names or ()
        self._images = images
        if sweeps > 1 and iter(source) is source:
            source, self._bound = list(self._batches(iter(source))), True
        self._source = source
        self._one_shot = iter(source) is source
        iterator = self._batches(iter(source))
        try:
            self.first = next(iterator)
        except StopIteration:
            raise CalibrationError(
                "calibration is empty: give at least one batch of representative inputs"
            ) from None
        self._rest: Iterator[tuple[Any, ...]] | None = iterator if self._one_shot else None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if not self._one_shot:
            yield from self._batches(iter(self._source))
        elif self._rest is None:
            raise CalibrationError(
                "calibration is an iterator that has been read to its end: give a list or a "
                "DataLoader, which can be read again"
            )
        else:
            rest, self._rest = self._rest, None
            yield from itertools.chain([self.first], rest)

    def head(self, images: int) -> Iterator[tuple[Any, ...]]:
        """The batches of the first images; 0: of all."""
        seen = 0
        for batch in self:
            if not images:
                yield batch
                continue
            yield tuple(_head(value, images - seen) for value in batch)
            seen += _size(batch)
            if seen >= images:
                return

    @property
    def batches(self) -> int | None:
        """The number of batches, where the source can tell."""
        try:
            return len(self._source)
        except TypeError:
            return None

    def _batches(self, iterator: Iterator[Any]) -> Iterator[tuple[Any, ...]]:
        seen = 0
        for index, item in enumerate(iterator):
            if self._images is not None and seen >= self._images:
                return
            batch = self._arguments(item, index)
            if self._images is not None:
                batch = tuple(_head(value, self._images - seen) for value in batch)
            seen += _size(batch)
            if _size(batch):
                self.seen = max(self.seen, seen)
                yield batch

    def _arguments(self, item: Any, index: int) -> tuple[Any, ...]:
        if self._bound:
            return tuple(item)
        if self._labels_behind:
            item = item[0]
        where = f"calibration batch {index}"
        if isinstance(self.names, Names):
            return self._taken_apart(bind_by(self.names, item, where), where)
        fed = bind(self._model, item, where)
        if any(is_container(value) for value in fed.values()):
            self.names = self.names or _names(fed, where)
            if isinstance(self.names, Names):
                return self._taken_apart(fed, where)
        if self.names and tuple(fed) != self.names:
            raise CalibrationError(
                f"calibration batch {index} feeds {', '.join(fed)}, those before it fed "
                f"{', '.join(self.names)}"
            )
        self.names = tuple(fed)
        return _checked(tuple(fed.values()), where)

    def _taken_apart(self, fed: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        assert isinstance(self.names, Names)
        try:
            return _checked(tuple(self.names.flat(fed)), where)
        except InputError as error:
            raise CalibrationError(f"{where}: {error}") from error


def _names(fed: Mapping[str, Any], where: str) -> Names:
    try:
        return names_of(fed)
    except InputError as error:
        raise CalibrationError(f"{where}: {error}") from error


def _checked(batch: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    for position, value in enumerate(batch):
        if not isinstance(value, Tensor):
            raise CalibrationError(
                f"{where}, input {position} is a {type(value).__name__}, not a tensor"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise CalibrationError(
                f"{where}, input {position} holds {bad} values that are NaN or infinite: look at "
                "the preprocessing"
            )
    return batch


def _head(value: Any, count: int) -> Any:
    return value[:count] if isinstance(value, Tensor) and value.dim() else value


def _size(batch: tuple[Any, ...]) -> int:
    first = batch[0] if batch else None
    return len(first) if isinstance(first, Tensor) and first.dim() else 1
