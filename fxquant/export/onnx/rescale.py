"""``m / 2^e`` on int64: products, an offset, shifts of uint64."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.export.onnx.codes import centered, clipped_long
from fxquant.export.onnx.writer import Writer
from fxquant.integer.rescale import LARGEST_INPUT, LARGEST_PRODUCT, LARGEST_RESULT

__all__ = ["emit_add_rescaled", "emit_rescale", "floor_shift"]

_OFFSET = 2**62


def floor_shift(w: Writer, x: ir.Value, shift: Tensor, name: str) -> ir.Value:
    """``⌊x / 2^e⌋`` of int64, |x| ≤ 2^62, 0 ≤ e ≤ 62: ONNX shifts unsigned integers alone.

    An offset of 2^62 makes them positive, and leaves as 2^(62 − e).
    """
    positive = w.cast(w.op("Add", x, w.scalar(_OFFSET, torch.int64)), torch.uint64)
    shifts = w.cast(w.constant(shift, f"{name}_shift"), torch.uint64)
    shifted = w.cast(w.op("BitShift", positive, shifts, direction="RIGHT"), torch.int64)
    back = torch.full_like(shift, _OFFSET) >> shift
    return w.op("Sub", shifted, w.constant(back, f"{name}_offset"))


def emit_rescale(w: Writer, node: fx.Node) -> ir.Value:
    """``clamp(round_half_even((x − z_x) · m / 2^e) + z)``."""
    a = w.arguments
    rank = len(w.sizes(a["x"]))
    shape = [1] * rank
    multiplier, shift = w.tensor(a["multiplier"]), w.tensor(a["shift"])
    if max(multiplier.numel(), shift.numel()) > 1:
        shape[a["axis"]] = -1
    name = str(a["multiplier"].target)
    factors = multiplier.reshape(shape), shift.reshape(shape)
    rounded = _scaled(w, a["x"], a["x_zero_point"], *factors, name)
    return _finished(w, rounded)


def emit_add_rescaled(w: Writer, node: fx.Node) -> ir.Value:
    """Each branch is rounded on its own."""
    a = w.arguments
    branches = [
        _scaled(
            w,
            a[x],
            a[f"{x}_zero_point"],
            torch.tensor([a[f"{x}_multiplier"]]),
            torch.tensor([a[f"{x}_shift"]]),
            f"{node.name}_{x}",
        )
        for x in ("a", "b")
    ]
    return _finished(w, w.op("Add", *branches))


def _finished(w: Writer, rounded: ir.Value) -> ir.Value:
    a = w.arguments
    if a["zero_point"]:
        rounded = w.op("Add", rounded, w.scalar(a["zero_point"], torch.int64))
    return w.cast(clipped_long(w, rounded, a["qmin"], a["qmax"]), a["dtype"])


def _scaled(
    w: Writer, x: fx.Node, zero_point: int, multiplier: Tensor, shift: Tensor, name: str
) -> ir.Value:
    """``round_half_even((x − z) · m / 2^e)``, saturated where the reference saturates."""
    dtype = w.shapes[x].dtype
    wide = centered(w, w.value(x), zero_point, torch.int64)
    if dtype == torch.int64:
        largest = LARGEST_INPUT
    else:
        info = torch.iinfo(dtype)
        largest = max(zero_point - info.min, info.max - zero_point)
    product = largest * int(multiplier.abs().max())
    if product < LARGEST_PRODUCT:
        whole = w.op("Mul", wide, w.constant(multiplier, f"{name}_multiplier"))
        result = _round_shift(w, whole, shift, name)
    else:
        result = _in_parts(w, wide, multiplier, shift, name)
    if product >> int(shift.min()) >= LARGEST_RESULT:
        result = clipped_long(w, result, -LARGEST_RESULT, LARGEST_RESULT)
    return result


def _round_shift(w: Writer, product: ir.Value, shift: Tensor, name: str) -> ir.Value:
    """``⌊(p + 2^(e−1) − 1 + odd) / 2^e⌋`` with the parity of ``⌊p / 2^e⌋``, |p| ≤ 2^62."""
    rounds = (shift > 0).to(torch.int64)
    half = (torch.ones_like(shift) << shift >> 1) - rounds
    floor = floor_shift(w, product, shift, name)
    odd = w.op("BitwiseAnd", floor, w.constant(rounds, f"{name}_rounds"))
    raised = w.op("Add", w.op("Add", product, odd), w.constant(half, f"{name}_half"))
    return floor_shift(w, raised, shift, name)


def _in_parts(w: Writer, wide: ir.Value, multiplier: Tensor, shift: Tensor, name: str) -> ir.Value:
    """Products of up to 2^83: `fxquant.integer.rescale` derives the parts."""
    one = torch.ones_like(shift)
    low_bits = (shift - 1).clamp(0, 24)
    if int(shift.min()) < 30:
        limit = (one << (shift + 33).clamp(max=62)) // multiplier.abs().clamp(min=1)
        limit = torch.where((shift >= 30) | (multiplier == 0), LARGEST_INPUT, limit + 1)
        wide = clipped_long(w, wide, -limit, limit)

    def constant(value: Tensor, what: str) -> ir.Value:
        return w.constant(value, f"{name}_{what}")

    high = floor_shift(w, wide, low_bits, f"{name}_low")
    back = w.op("Mul", high, constant(one << low_bits, "power"))
    low = w.op("Mul", w.op("Sub", wide, back), constant(multiplier, "multiplier"))
    total = _sum(
        w,
        w.op("Mul", high, constant(2 * multiplier, "twice")),
        floor_shift(w, low, low_bits, f"{name}_low"),
        floor_shift(
            w,
            w.op("Add", low, constant((one << low_bits) - 1, "rest")),
            low_bits,
            f"{name}_low",
        ),
    )
    return _round_shift(w, total, shift - low_bits + 1, f"{name}_high")


def _sum(w: Writer, first: ir.Value, *rest: ir.Value) -> ir.Value:
    # Sum knows floats alone.
    for value in rest:
        first = w.op("Add", first, value)
    return first
