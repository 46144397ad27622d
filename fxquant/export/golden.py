"""What the self test of an exported folder compares with: noise in, the reference's outputs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.steps import type_number
from passes.infra.verify import flatten

__all__ = ["golden_bytes"]

_SEED = 0


def golden_bytes(integer: fx.GraphModule, example: Sequence[Any], exact: bool) -> bytes:
    """Whether every bit counts, how many inputs and outputs, then the tensors.

    Each has a type, its shape, a size in bytes and its bytes; all numbers are 64-bit. Floats are
    seeded normal noise in the shape of `example`; integers may be indices, and stay the example's.
    """
    random = torch.Generator().manual_seed(_SEED)
    inputs = [
        torch.randn(x.shape, generator=random) if x.dtype == torch.float32 else x for x in example
    ]
    with torch.no_grad():
        outputs = [value for _, value in flatten(integer(*inputs))]
    parts = [struct.pack("<3q", int(exact), len(inputs), len(outputs))]
    parts += [_tensor(value) for value in (*inputs, *outputs)]
    return b"".join(parts)


def _tensor(value: Tensor) -> bytes:
    dense = value.detach().contiguous()
    raw = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    head = (type_number(dense.dtype), dense.dim(), *dense.shape, len(raw))
    return struct.pack(f"<{len(head)}q", *head) + raw
