"""Square roots and their inverses on integers."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR_BITS = 22
_STEPS = 6


def bit_length(v: Tensor) -> Tensor:
    """The number of bits of each non-negative int64, as int64; 0 has none."""
    # In float64 a run of leading ones could round up to the next power of two. This leaves the
    # first bit alone and clears the second one after a first.
    _, exponent = torch.frexp((v & ~(v >> 1)).to(torch.float64))
    return exponent.to(torch.int64)


def integer_square_root(v: Tensor) -> Tensor:
    """``⌊√v⌋`` for int64 ``v`` in [2^60, 2^62), by Newton's method from 2^31 to the fixpoint.

    ``k ← min(k, ⌊(k + ⌊v/k⌋)/2⌋)`` falls until it is the root. The start is at most twice the root,
    and a step turns a relative error ε into at most ε²/2 (ε²/4 for ε = 1): 1, 2^-2, 2^-5, 2^-11,
    2^-23, 2^-47, 2^-95. Six steps do: a root is at least 2^-33 below the next integer.
    """
    root = torch.full_like(v, 2**31)
    for _ in range(_STEPS):
        root = torch.minimum(root, (root + v // root) >> 1)
    return root


def inverse_root(v: Tensor) -> tuple[Tensor, Tensor]:
    """``(f, e)`` with ``1/√v ≈ f / 2^e``, both int64, for int64 ``v`` in [0, 2^62).

    ``j`` moves v · 4^j to [2^60, 2^62); ``k = ⌊√(v · 4^j)⌋``, ``f = ⌊2^52 / k⌋``, ``e = 52 − j``.
    The floor of k loses at most 2^-30 of it and that of f, which is in [2^21, 2^22], at most
    2^-21: f / 2^e is within a relative error of 2^-20.9 (see `INVERSE_ROOT_ERROR`). For v = 0, f
    is 0.
    """
    j = (62 - bit_length(v)) >> 1
    root = integer_square_root(torch.where(v > 0, v << (2 * j), 2**60))
    factor = 2**52 // root
    return torch.where(v > 0, factor, 0), 52 - j


INVERSE_ROOT_ERROR = 2.0**-20.9
"""The largest relative error of `inverse_root`: 2^-21 + 2^-30, rounded up."""
