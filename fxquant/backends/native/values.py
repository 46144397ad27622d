"""Values as the native target sees them: strided tensors inside of buffers.

Torch's meta tensors carry shapes, strides and offsets, so that reshape, permute, slicing and the
like are torch's own arithmetic: where the result is a view, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Border", "Buffer", "Loops", "Value", "image_strides"]


@dataclass(frozen=True)
class Border:
    """Pixels of the zero point around an image: rows above and below, columns on both sides."""

    rows: int = 0
    columns: int = 0

    def __or__(self, other: Border) -> Border:
        return Border(max(self.rows, other.rows), max(self.columns, other.columns))

    def __bool__(self) -> bool:
        return bool(self.rows or self.columns)


@dataclass(eq=False)
class Buffer:
    """Memory that values lie in: the arena, a constant, or a tensor of the caller.

    Attributes:
        place: "arena", "input", "output" or "constant".
        size: in bytes, for all samples that are planned.
        port: the number of the input or output.
        offset: in the arena (for one sample) or among the constants, once it is known.
        border: of zero points around each image, which the buffer was made with.
        image: the tensor of the whole image, for which the border is.
        filled: the zero point that the border holds, once it is filled.
    """

    place: str
    size: int
    port: int = -1
    offset: int = -1
    border: Border = Border()
    image: Tensor | None = None
    filled: int | None = None


@dataclass(eq=False)
class Value:
    """A strided tensor (a meta tensor, strides in elements) inside of a buffer."""

    tensor: Tensor
    buffer: Buffer

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        return tuple(self.tensor.stride())

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.tensor.dtype

    @property
    def offset(self) -> int:
        """Of the first element, in bytes."""
        return int(self.tensor.storage_offset()) * self.dtype.itemsize


def image_strides(
    shape: Sequence[int], border: Border, pixel: int
) -> tuple[tuple[int, ...], int, int]:
    """Strides and offset of [N, C, H, W] with its channels innermost, and the elements in all."""
    samples, _, height, width = shape
    row = (width + 2 * border.columns) * pixel
    image = (height + 2 * border.rows) * row
    offset = border.rows * row + border.columns * pixel
    return (image, 1, row, pixel), offset, samples * image


@dataclass
class Loops:
    """The loop nest that several tensors of one shape share, from outside to inside.

    Dimension 0 stays by itself where it counts samples. The others are in the order of the first
    tensor's strides, and are merged where every tensor allows it. A stride of 0 broadcasts.
    """

    sizes: list[int]
    strides: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[Sequence[int]], batched: bool) -> Loops:
        """Of tensors with these strides; those in front say the order."""
        head = 1 if batched else 0
        inner = [d for d in range(head, len(shape)) if shape[d] != 1]
        inner.sort(key=lambda d: -strides[0][d])
        order = [*range(head), *inner]
        sizes = [shape[d] for d in order]
        rows = [[row[d] for d in order] for row in strides]
        at = head
        while at + 1 < len(sizes):
            if all(row[at] == row[at + 1] * sizes[at + 1] for row in rows):
                sizes[at] *= sizes.pop(at + 1)
                for row in rows:
                    row.pop(at)
            else:
                at += 1
        return cls(sizes, rows)

    def padded(self, rank: int, batched: bool) -> Loops | None:
        """With dimensions of size 1 behind the batch up to `rank`; None where there are more."""
        missing = rank - len(self.sizes)
        if missing < 0:
            return None
        head = 1 if batched else 0
        ones, zeros = [1] * missing, [0] * missing
        return Loops(
            self.sizes[:head] + ones + self.sizes[head:],
            [row[:head] + zeros + row[head:] for row in self.strides],
        )

    def with_channels(self, batched: bool) -> Loops:
        """With an innermost dimension of stride 1 or 0 in every tensor; of size 1 if not."""
        head = 1 if batched else 0
        dense = len(self.sizes) > head and all(row[-1] in (0, 1) for row in self.strides)
        # The output and the first operand need their channels next to each other.
        if dense and self.strides[0][-1] == 1:
            return self
        return Loops([*self.sizes, 1], [[*row, 1] for row in self.strides])
