"""Calibration images over processes: `Share`, which is everything where there is one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Share", "computing_alone"]

T = TypeVar("T")
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def computing_alone() -> Iterator[None]:
    """Inside, this process shares its images with nobody: the others compute something else."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


@dataclass(frozen=True)
class Share:
    """The calibration images of one process: every `size`-th one, from `rank`.

    All processes draw the same numbers of images of the whole set; each computes those that it
    holds, and sums are made over all of them: the same result as one process, up to the order
    of the additions.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_this_process(cls) -> Share:
        """By ``torch.distributed`` where it is initialised (``torchrun``)."""
        if dist.is_available() and dist.is_initialized() and not _alone.get():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def holds(self, first: int, count: int) -> Tensor:
        """Which of the images `first` to `first + count` are held: their offsets, int64."""
        numbers = torch.arange(count)
        return numbers[(numbers + first) % self.size == self.rank]

    def own(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The positions in a drawn batch that this process holds, and their rows in its caches."""
        positions = torch.nonzero(drawn % self.size == self.rank).flatten()
        return positions, drawn[positions] // self.size

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size == 1 or not tensors:
            return
        flat = _where_sums_are_made(torch.cat([tensor.flatten() for tensor in tensors]))
        dist.all_reduce(flat)
        offset = 0
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def gather(self, part: T) -> list[T]:
        """What every process has, in all of them; anything that pickle takes."""
        if self.size == 1:
            return [part]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part)
        return parts

    def total(self, count: int) -> int:
        """The sum of a number over the processes."""
        if self.size == 1:
            return count
        numbers = _where_sums_are_made(torch.tensor([count]))
        dist.all_reduce(numbers)
        return int(numbers)


def _where_sums_are_made(tensor: Tensor) -> Tensor:
    """NCCL sums on GPUs only, gloo on the CPU."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor.cpu()
