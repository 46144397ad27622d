"""Batches of preprocessed images that can be iterated again and again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch

from fxquant.arguments import checked
from fxquant.data.images import ImageSet, open_images
from fxquant.data.preprocessing import PREPROCESSINGS, Preprocessing
from fxquant.errors import DataError

NO_LABEL = -1


class ImageBatches:
    """An iterable of ``(images f32[N,3,H,W], labels int64[N])``, decoded on the way.

    Each iteration starts from the first image, and only ``prefetch + 1`` batches are in memory at
    a time. The last batch may be smaller. Labels are -1 where the images have none.

    Args:
        images: what to load, in this order.
        preprocessing: what to do with each image.
        batch_size: images in a batch.
        prefetch: batches that threads decode while the caller works on the current one; 0 decodes
            in the caller's thread.

    Raises:
        DataError: while iterating, for an image that cannot be read (names it), or for images
            that have different sizes after preprocessing.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        *,
        batch_size: int = 32,
        prefetch: int = 1,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"the batch size is {batch_size}; expected a positive number")
        self.images = images
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.prefetch = prefetch

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self.images.labels is not None

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        starts = range(0, len(self.images), self.batch_size)
        if self.prefetch < 1:
            yield from map(self._batch, starts)
            return
        with ThreadPoolExecutor(self.prefetch, "fxquant-decode") as pool:
            waiting: deque[Future[tuple[torch.Tensor, torch.Tensor]]] = deque()
            coming = iter(starts)
            waiting.extend(pool.submit(self._batch, start) for start in islice(coming, 1))
            try:
                while waiting:
                    room = self.prefetch + 1 - len(waiting)
                    waiting.extend(pool.submit(self._batch, at) for at in islice(coming, room))
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = range(start, min(start + self.batch_size, len(self.images)))
        tensors = [self._image(index) for index in indices]
        shapes = {tensor.shape: index for tensor, index in zip(tensors, indices, strict=True)}
        if len(shapes) > 1:
            (_, first), (_, second) = list(shapes.items())[:2]
            raise DataError(
                f"{self.images.names[first]} and {self.images.names[second]} have different sizes "
                f"after preprocessing ({self.preprocessing}); set crop"
            )
        labels = self.images.labels
        found = [NO_LABEL if labels is None else labels[index] for index in indices]
        return torch.stack(tensors), torch.tensor(found, dtype=torch.int64)

    def _image(self, index: int) -> torch.Tensor:
        image = self.images.open(index)
        try:
            return self.preprocessing(image)
        except DataError as error:
            raise DataError(f"{self.images.names[index]}: {error}") from None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.images.names[index]}: cannot be preprocessed ({error})"
            ) from error


@checked(source=DataError, preprocessing=DataError, images=DataError)
def open_batches(
    source: str | Path,
    *,
    preprocessing: str | Preprocessing = PREPROCESSINGS["imagenet"],
    images: int | None = None,
    select: str = "spread",
    batch_size: int = 32,
    prefetch: int = 1,
) -> ImageBatches:
    """Batches of a folder or archive: `open_images`, `ImageSet.take` and `ImageBatches` in one.

    Args:
        source: an image folder or an ``.npz`` file; see `open_images`.
        preprocessing: a `Preprocessing`, or its name with changes; see `Preprocessing.parse`.
        images: how many images, or None for all.
        select: ``"spread"`` takes them evenly over all names, ``"first"`` the first by name.
        batch_size, prefetch: see `ImageBatches`.

    Raises:
        DataError: the source, the preprocessing or a number is wrong.
    """
    if isinstance(preprocessing, str):
        preprocessing = Preprocessing.parse(preprocessing)
    chosen = open_images(source).take(images, select)
    return ImageBatches(chosen, preprocessing, batch_size=batch_size, prefetch=prefetch)
