"""Values of all calibration images: in memory while they fit, in mapped files beyond."""

from __future__ import annotations

import math
import mmap
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.errors import CompileError

__all__ = ["Caches", "Rows", "room_for_values"]

_LEAST = 1 / 16  # of the memory is for cached values, whatever a block takes
_RESERVE = 1 / 8  # of it is for mapped pages in flight and gaps in the heap
_RELEASE = 64 * 2**20  # bytes of a mapped file that are touched before its pages are let go


def room_for_values(memory_gib: float, work: float) -> int:
    """Bytes left for cached values of what the whole process may hold.

    Args:
        memory_gib: the bound.
        work: bytes that the training of one block takes.
    """
    memory = memory_gib * 2**30
    return int(max(memory * (1 - _RESERVE) - _resident() - work, memory * _LEAST))


def _resident() -> int:
    """Bytes that this process holds already."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # no Linux: the most it has ever held, in kilobytes (bytes on macOS)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * os.sysconf("SC_PAGESIZE")


class Rows:
    """One value of every image: a tensor [images, ...] in memory or in a mapped file."""

    def __init__(self, tensor: Tensor, rows: int, mapped: Any = None) -> None:
        self.tensor = tensor
        self._rows = rows
        self._mapped = mapped
        self._touched = 0

    @property
    def bytes(self) -> int:
        """The size, wherever it is."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def in_memory(self) -> bool:
        """Whether it is not in a file."""
        return self._mapped is None

    def write(self, first: int, values: Tensor) -> None:
        """Store the values of the images from `first` on, [count · rows, ...]."""
        count = values.shape[0] // self._rows
        part = self.tensor[first : first + count]
        part.copy_(values.detach().reshape(part.shape))
        self._touch(part)

    def take(self, images: Tensor | slice) -> Tensor:
        """The values of some images, a copy: [count · rows, ...]."""
        part = self.tensor[images]
        part = part.clone() if isinstance(images, slice) else part
        self._touch(part)
        return part.flatten(0, 1) if self._rows > 1 else part

    def _touch(self, part: Tensor) -> None:
        if self._mapped is None:
            return
        self._touched += part.numel() * part.element_size()
        if self._touched >= _RELEASE:
            # Pages of a mapped file count as the process's memory until they are given back;
            # what was written stays in the file.
            self._mapped._mmap.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


class Caches:
    """Makes `Rows` within a memory budget, and removes the files at the end.

    Args:
        room: bytes of the values in memory.
    """

    def __init__(self, room: float) -> None:
        self._free = int(room)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, Path] = {}
        self._count = 0

    def __enter__(self) -> Caches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def make(self, images: int, batch: int, like: Tensor, name: str) -> Rows:
        """Room for a value of `images` images, of which `like` holds `batch`.

        Raises:
            CompileError: the first dimension does not hold the images, or the disk is full.
        """
        if like.dim() == 0 or batch == 0 or like.shape[0] % batch or not like.shape[0]:
            raise CompileError(
                f"the value {name} of shape {list(like.shape)} does not hold the {batch} images of "
                "a batch along its first dimension, so that it cannot be cached: choose a coarser "
                "reconstruction.granularity"
            )
        rows = like.shape[0] // batch
        shape = (images, *((rows,) if rows > 1 else ()), *like.shape[1:])
        size = math.prod(shape) * like.element_size()
        if size <= self._free:
            self._free -= size
            return Rows(_laid_out(_pages(size).view(like.dtype), shape), rows)
        return self._on_disk(shape, like.dtype, rows)

    def trim(self, rows: Rows, images: int) -> None:
        """Keep the first images of a value that turned out to have fewer."""
        if rows.in_memory:
            self._free += rows.bytes
        rows.tensor = rows.tensor[:images]
        if rows.in_memory:
            self._free -= rows.bytes

    def drop(self, rows: Rows) -> None:
        """Give the room of a value back."""
        if rows.in_memory:
            self._free += rows.bytes
        elif path := self._files.pop(id(rows), None):
            path.unlink()
        rows.tensor = torch.empty(0)

    def _on_disk(self, shape: Sequence[int], dtype: torch.dtype, rows: int) -> Rows:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fxquant-")
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.bin"
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        size = math.prod(shape) * kind.itemsize
        try:
            with path.open("wb") as file:
                # On a full disk a mapped file that has no room kills the process when written to.
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise CompileError(
                f"reconstruction: {size / 2**30:.1f} GiB of cached values do not fit into "
                f"{path.parent} ({error.strerror}): set TMPDIR to a larger disk, raise "
                "reconstruction.memory_gib or use fewer reconstruction.images"
            ) from error
        mapped = np.memmap(path, dtype=kind, mode="r+", shape=(math.prod(shape),))
        made = Rows(_laid_out(torch.from_numpy(mapped), shape), rows, mapped)
        self._files[id(made)] = path
        return made


def _laid_out(values: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor over `values`; images have their channels last, as convolutions want them."""
    if len(shape) != 4:
        return values.view(*shape)
    count, channels, height, width = shape
    return values.view(count, height, width, channels).permute(0, 3, 1, 2)


def _pages(size: int) -> Tensor:
    """Memory outside the heap, uint8: there, small tensors would settle in the gap it leaves."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)
