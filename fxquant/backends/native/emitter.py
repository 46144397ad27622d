"""The steps and the constants of a plan, as lowerings write them down."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.steps import Count, Pointer, Step
from fxquant.backends.native.values import Buffer, Loops, Value

__all__ = ["Emitter", "UnsupportedError"]

_RANK = 6


class UnsupportedError(Exception):
    """A node that no native kernel computes: it runs in Python, between two native segments."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{node.name}: {why}")
        self.node = node
        self.why = why


class Emitter:
    """Collects steps for the node at hand, `current`, and the constants that they read.

    `batch` is the number of samples that the plan is made for, None where it holds for its shapes
    alone.
    """

    def __init__(self, current: fx.Node, batch: int | None) -> None:
        self.current = current
        self.batch = batch
        self.steps: list[Step] = []
        self.constants: dict[bytes, tuple[Buffer, bytes]] = {}

    @property
    def batched(self) -> bool:
        """Whether dimension 0 counts samples everywhere."""
        return self.batch is not None

    def constant(self, value: Tensor) -> Buffer:
        """A tensor that goes into the file; equal ones go there once."""
        data = value.detach().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        key = hashlib.sha256(raw).digest()
        if key not in self.constants:
            self.constants[key] = (Buffer("constant", len(raw)), raw)
        return self.constants[key][0]

    def numbers(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Pointer:
        """A table of integers among the constants."""
        return Pointer(self.constant(torch.tensor(list(values), dtype=dtype)))

    def data(self, value: Tensor) -> Pointer:
        """The address of a constant."""
        return Pointer(self.constant(value))

    @staticmethod
    def at(value: Value) -> Pointer:
        """The address of a value's first element."""
        return Pointer(value.buffer, value.offset)

    def count(self, number: int) -> Count | int:
        """Of samples: it grows with the batch, where the plan is for any batch."""
        return Count(number // self.batch) if self.batch is not None else number

    def samples(self, value: Value) -> Count | int:
        """The length of the outermost loop of a plain kernel."""
        return self.count(value.shape[0]) if self.batched else 1

    def loops(self, shape: Sequence[int], *strides: Sequence[int]) -> tuple[Pointer, ...] | None:
        """Shape and strides for a plain kernel: the first strides say the order of the loops."""
        loops = Loops.of(shape, strides, self.batched)
        if not self.batched:
            loops = Loops([1, *loops.sizes], [[0, *row] for row in loops.strides])
        padded = loops.padded(_RANK, True)
        if padded is None:
            return None
        # Work is split over dimension 1, where there is any: loops of size 1 belong behind it.
        sizes, rows = _outermost_first(padded.sizes, padded.strides)
        return (self.numbers(sizes), *(self.numbers(row) for row in rows))

    def emit(
        self,
        kernel: str,
        fields: Mapping[str, Any],
        reads: Sequence[Value],
        writes: Sequence[Value],
        work: float,
        *,
        is_border: bool = False,
    ) -> None:
        """Add a step; `work` is an estimate of its nanoseconds for all samples planned."""
        self.steps.append(
            Step(
                kernel,
                fields,
                tuple(reads),
                tuple(writes),
                self.current.name,
                work / (self.batch or 1) if not is_border else work,
                is_border,
            )
        )


def _outermost_first(
    sizes: list[int], strides: list[list[int]]
) -> tuple[list[int], list[list[int]]]:
    """Dimensions of size 1 move behind the first that is longer."""
    ones = [d for d in range(1, len(sizes) - 1) if sizes[d] == 1]
    rest = [d for d in range(1, len(sizes)) if d not in ones]
    order = [0, *rest[:-1], *ones, rest[-1]]
    return [sizes[d] for d in order], [[row[d] for d in order] for row in strides]
