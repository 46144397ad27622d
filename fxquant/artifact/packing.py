"""Weights of four bits or fewer, two to a byte, as files hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

__all__ = [
    "fits_four_bits",
    "pack_four_bits",
    "stored_bytes",
    "tensor_bytes",
    "unpack_four_bits",
]


def fits_four_bits(tensor: Tensor) -> bool:
    """Whether `tensor` is int8 and all its codes lie in [-8, 7]."""
    if tensor.dtype != torch.int8 or not tensor.numel():
        return False
    low, high = torch.aminmax(tensor)
    return int(low) >= -8 and int(high) <= 7


def pack_four_bits(tensor: Tensor) -> Tensor:
    """Codes in [-8, 7] of any shape, two to a byte, the first in the low half: uint8 [(n+1)/2]."""
    nibbles = tensor.flatten().to(torch.int16) & 15
    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return (nibbles[0::2] | nibbles[1::2] << 4).to(torch.uint8)


def unpack_four_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The int8 tensor of `shape` that `pack_four_bits` packed.

    Raises ValueError where the shape does not fit the bytes.
    """
    count = 1
    for extent in shape:
        count *= int(extent)
    if len(packed) != (count + 1) // 2:
        raise ValueError(f"{len(packed)} bytes do not hold {count} codes of four bits")
    wide = packed.to(torch.int16)
    nibbles = torch.stack([wide & 15, wide >> 4], dim=1).flatten()[:count]
    return (nibbles - 16 * (nibbles > 7)).to(torch.int8).reshape(tuple(shape))


def stored_bytes(tensor: Tensor) -> int:
    """How many bytes a file takes for `tensor`."""
    if fits_four_bits(tensor):
        return (tensor.numel() + 1) // 2
    return tensor.numel() * tensor.element_size()


def tensor_bytes(graph: fx.GraphModule) -> int:
    """How many bytes a file takes for the tensors of a graph, shared ones once."""
    tensors = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
    return sum(stored_bytes(tensor) for tensor in tensors.values())
