"""Rows of codes for property tests: degenerate ones, extreme ones and random ones."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("random", "equal", "one_hot", "cold_hot", "lowest", "highest", "two_ends", "narrow")


def row(kind: str, dtype: torch.dtype, length: int, seed: int) -> Tensor:
    """One row of codes of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(dtype)

    def integers(low: int, high: int, size: int = length) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=generator).to(dtype)

    if kind == "random":
        return integers(info.min, info.max)
    if kind == "narrow":
        middle = int(integers(info.min + 2, info.max - 2, 1))
        return integers(middle - 2, middle + 2)
    value = {
        "equal": int(integers(info.min, info.max, 1)),
        "one_hot": info.min,
        "cold_hot": info.max,
        "lowest": info.min,
        "highest": info.max,
        "two_ends": info.min,
    }[kind]
    result = torch.full((length,), value, dtype=dtype)
    if kind in ("one_hot", "cold_hot"):
        result[seed % length] = info.max if kind == "one_hot" else info.min
    if kind == "two_ends":
        result[::2] = info.max
    return result


LENGTHS = st.one_of(st.sampled_from([1, 2, 197, 4095, 4096]), st.integers(1, 4096))
CODE_DTYPES = st.sampled_from([torch.uint8, torch.int8, torch.int16])
ROW_KINDS = st.sampled_from(KINDS)
SEEDS = st.integers(0, 2**31)
ROWS = st.builds(row, ROW_KINDS, CODE_DTYPES, LENGTHS, SEEDS)
BYTE_ROWS = st.builds(row, ROW_KINDS, st.sampled_from([torch.uint8, torch.int8]), LENGTHS, SEEDS)
