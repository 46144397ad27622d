"""Weights of four bits or fewer, as files hold them: several codes to a byte.

A code is stored in two's complement of two or four bits, the first of a byte in its lowest bits.
Where the codes of a weight as a whole need more, those of each channel may still fit: a channel
with an affine grid of 2^b levels holds 2^b neighbouring integers. Then a file holds the codes less
an offset for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

__all__ = ["WIDTHS", "Packed", "pack", "stored_bytes", "tensor_bytes", "unpack"]

WIDTHS = (2, 4)
_CHANNELS = (0, 1)  # the dimension of the output channels: of a transposed convolution, the second


@dataclass(frozen=True)
class Packed:
    """Codes of `bits` bits, uint8 [n · bits / 8], and what was taken off them: int8, or None."""

    bits: int
    codes: Tensor
    offsets: Tensor | None

    @property
    def bytes(self) -> int:
        """How many bytes both take."""
        return self.codes.numel() + (0 if self.offsets is None else self.offsets.numel())


def pack(tensor: Tensor) -> Packed | None:
    """`tensor` in as few bits as it fits; None where it is not int8 or needs more than four."""
    if tensor.dtype != torch.int8 or not tensor.numel() or _is_wide(tensor):
        return None
    for bits in WIDTHS:
        if _fits(tensor.to(torch.int16), bits):
            return Packed(bits, _pack(tensor.to(torch.int16), bits), None)
        for offsets in _offsets(tensor, bits):
            codes = tensor.to(torch.int16) - offsets
            if _fits(codes, bits):
                return Packed(bits, _pack(codes, bits), offsets)
    return None


def unpack(packed: Packed, shape: Sequence[int]) -> Tensor:
    """The int8 tensor of `shape` that `pack` packed.

    Raises ValueError where the shape does not fit the bytes or the offsets.
    """
    bits, a_byte = packed.bits, 8 // packed.bits
    count = math.prod(int(extent) for extent in shape)
    if len(packed.codes) != -(-count // a_byte):
        raise ValueError(f"{len(packed.codes)} bytes do not hold {count} codes of {bits} bits")
    shifts = torch.arange(0, 8, bits, dtype=torch.int16)
    fields = (packed.codes.to(torch.int16)[:, None] >> shifts & (1 << bits) - 1).flatten()[:count]
    codes = (fields - (1 << bits) * (fields >= (1 << bits - 1))).reshape(tuple(shape))
    if packed.offsets is None:
        return codes.to(torch.int8)
    try:
        return (codes + packed.offsets.expand(codes.shape)).to(torch.int8)
    except RuntimeError as error:
        raise ValueError(f"offsets do not fit the codes: {error}") from error


def stored_bytes(tensor: Tensor) -> int:
    """How many bytes a file takes for `tensor`."""
    packed = pack(tensor)
    return tensor.numel() * tensor.element_size() if packed is None else packed.bytes


def tensor_bytes(graph: fx.GraphModule) -> int:
    """How many bytes a file takes for the tensors of a graph, shared ones once."""
    tensors = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
    return sum(stored_bytes(tensor) for tensor in tensors.values())


def _is_wide(tensor: Tensor) -> bool:
    """Whether one channel of each dimension shows that no width fits, without reading the rest."""
    firsts = [tensor.select(axis, 0) for axis in _CHANNELS if tensor.dim() > axis]
    return bool(firsts) and all(_span(first) >= 1 << WIDTHS[-1] for first in firsts)


def _span(codes: Tensor) -> int:
    low, high = torch.aminmax(codes)
    return int(high) - int(low)


def _fits(codes: Tensor, bits: int) -> bool:
    low, high = torch.aminmax(codes)
    return int(low) >= -(1 << bits - 1) and int(high) < (1 << bits - 1)


def _offsets(tensor: Tensor, bits: int) -> list[Tensor]:
    """For each dimension of channels, what puts their least codes at the bottom of the range."""
    found = []
    for axis in _CHANNELS:
        if tensor.dim() > 1:
            others = [dim for dim in range(tensor.dim()) if dim != axis]
            least = tensor.amin(others, keepdim=True).to(torch.int16)
            found.append((least + (1 << bits - 1)).clamp(max=127).to(torch.int8))
    return found


def _pack(codes: Tensor, bits: int) -> Tensor:
    a_byte = 8 // bits
    fields = codes.flatten() & (1 << bits) - 1
    fields = torch.cat([fields, fields.new_zeros(-len(fields) % a_byte)]).view(-1, a_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.int16)
    return (fields << shifts).sum(1).to(torch.uint8)
