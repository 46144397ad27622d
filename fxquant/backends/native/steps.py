"""What a plan consists of: steps, and what goes into the parameters of their kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxquant.backends.native.values import Buffer, Value

__all__ = ["Count", "Pointer", "Port", "Step", "has_number", "type_number"]

_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float32: 5,
    torch.bool: 6,
}


def has_number(dtype: torch.dtype) -> bool:
    """Whether the C++ side knows a type."""
    return dtype in _TYPES


def type_number(dtype: torch.dtype) -> int:
    """How the C++ side calls a type."""
    return _TYPES[dtype]


@dataclass(frozen=True)
class Pointer:
    """An address inside a buffer: ``offset`` bytes behind where the buffer starts."""

    buffer: Buffer
    offset: int = 0


@dataclass(frozen=True)
class Count:
    """A number that grows with the batch: ``each`` for one sample."""

    each: int


@dataclass(frozen=True)
class Port:
    """An input or output of a program: a dense tensor of the caller."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(eq=False)
class Step:
    """One call of a kernel.

    Attributes:
        kernel: its name.
        fields: of its parameters: numbers, `Pointer`, `Count`; None is a null pointer.
        reads, writes: the values that it touches.
        node: the node of the integer graph that it stands for.
        work: an estimate of its nanoseconds on one thread, for one sample.
        is_border: whether it writes the borders of its values only.
        serial: whether one thread does all of it.
        barrier: whether all threads must have finished what is before it.
    """

    kernel: str
    fields: Mapping[str, Any]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    node: str
    work: float
    is_border: bool = False
    serial: bool = False
    barrier: bool = True
    notes: tuple[str, ...] = field(default=())
