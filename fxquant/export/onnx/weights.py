"""Weights as they are stored: int8, uint8 with a zero point of 128, or 4 bits."""

from __future__ import annotations

import ml_dtypes
import onnx_ir as ir
import torch
from torch import Tensor

from fxquant.export.onnx.writer import Writer

__all__ = ["stored_weight", "weight_zero_point", "weight_zeros"]


def stored_weight(w: Writer, value: Tensor, name: str) -> ir.Value:
    """An int8 weight in the type of the options; 16 codes a channel are stored in 4 bits.

    These are cast, and shifted where a channel needs that, when the file is loaded. ONNX Runtime
    keeps its integer layers behind a cast, not behind a dequantized INT4.
    """
    zero, dtype = _zero(w)
    shift = _shift_to_4_bits(value)
    if shift is None:
        return w.constant((value.int() + zero).to(dtype), name)
    stored = w.stored((value - shift).numpy().astype(ml_dtypes.int4), f"{name}_int4")
    moved = shift.int() + zero
    if not bool(moved.any()):
        return w.cast(stored, dtype)
    # Runtimes add in 32 bits.
    offset = w.constant(moved, f"{name}_shift")
    return w.cast(w.op("Add", w.cast(stored, torch.int32), offset), dtype)


def weight_zero_point(w: Writer) -> ir.Value | None:
    """The zero point of weights that have none of their own; None for 0."""
    zero, dtype = _zero(w)
    return w.scalar(zero, dtype) if zero else None


def weight_zeros(w: Writer, shift: Tensor | None) -> Tensor | None:
    """The zero points of stored weights whose own are `shift`; None where all are 0.

    Raises TargetError where they are outside of the type.
    """
    zero, dtype = _zero(w)
    if shift is None:
        return torch.tensor([zero], dtype=dtype) if zero else None
    found, info = shift.to(torch.int64) + zero, torch.iinfo(dtype)
    if int(found.min()) < info.min or int(found.max()) > info.max:
        raise w.refusal(f"zero points of weights outside of {w.options.weights}")
    return found.to(dtype)


def _zero(w: Writer) -> tuple[int, torch.dtype]:
    return (128, torch.uint8) if w.options.weights == "uint8" else (0, torch.int8)


def _shift_to_4_bits(weight: Tensor) -> Tensor | None:
    """What to take from each channel, of either of the first dimensions, for codes of INT4."""
    if weight.dtype != torch.int8 or weight.numel() < 2:
        return None
    for axis in range(min(weight.dim(), 2)):
        rest = [dim for dim in range(weight.dim()) if dim != axis]
        low, high = weight.amin(rest, True), weight.amax(rest, True)
        if bool((high.int() - low.int() <= 15).all()):
            fits = (low >= -8) & (high <= 7)
            return torch.where(fits, 0, low.int() + 8).to(torch.int8)
    return None
