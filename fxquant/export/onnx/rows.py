"""What works along rows on integers: softmax, ShiftGELU, layer norm, division by the norm.

Quotients are divisions in float64 whose floor is the exact one, as in the reference; square roots
are those of float64 with a correction by integers. Tables are read by Gather.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.export.onnx.codes import centered, clipped_long
from fxquant.export.onnx.writer import Writer
from fxquant.integer.bounds import INT32_LIMIT, accumulator_dtype, input_range
from fxquant.integer.softmax import distances, log_exponentials, log_values, shift_exp

__all__ = [
    "emit_gelu_i_vit",
    "emit_layer_norm_i_vit",
    "emit_layer_norm_integer",
    "emit_layer_norm_power_of_two",
    "emit_normalize_integer",
    "emit_softmax_i_vit",
    "emit_softmax_log2",
    "emit_softmax_table",
]

_DOUBLE, _LONG = torch.float64, torch.int64


def _last(w: Writer) -> ir.Value:
    return w.numbers(-1)


# -- softmax -------------------------------------------------------------------------------


def _numerators(w: Writer, table: Tensor, name: str) -> ir.Value:
    """The table's entries at each row's distances from its maximum; 0 where the mask is False."""
    a = w.arguments
    dtype = w.shapes[a["x"]].dtype
    above = centered(w, w.value(a["x"]), torch.iinfo(dtype).min, torch.int32)
    mask = None if a["mask"] is None else w.value(a["mask"])
    seen = above
    if mask is not None:
        seen = w.op("Where", mask, above, w.scalar(0, torch.int32))
    top = w.op("ReduceMax", seen, _last(w), keepdims=1)
    distance = w.op("Sub", top, above)
    entries = w.constant(table, name)
    if mask is None:
        return w.op("Gather", entries, distance)
    distance = w.op("Max", distance, w.scalar(0, torch.int32))
    none = w.scalar(0, table.dtype)
    return w.op("Where", mask, w.op("Gather", entries, distance), none)


def emit_softmax_table(w: Writer, node: fx.Node) -> ir.Value:
    """``⌊(2 e n + 256 T) / (512 T)⌋``."""
    a = w.arguments
    table = w.tensor(a["table"]).to(_DOUBLE)
    e = _numerators(w, table, f"{a['table'].target}_double")
    total = w.op("ReduceSum", e, _last(w), keepdims=1)
    above = w.op(
        "Add",
        w.op("Mul", e, w.scalar(2.0 * a["numerator"], _DOUBLE)),
        w.op("Mul", total, w.scalar(256.0, _DOUBLE)),
    )
    below = w.op("Max", w.op("Mul", total, w.scalar(512.0, _DOUBLE)), w.scalar(1.0, _DOUBLE))
    floor = w.op("Floor", w.op("Div", above, below))
    bounds = (w.scalar(float(a[name]), _DOUBLE) for name in ("qmin", "qmax"))
    return w.cast(w.op("Clip", floor, *bounds), a["dtype"])


def emit_softmax_i_vit(w: Writer, node: fx.Node) -> ir.Value:
    """``F = ⌊(2^31 − 1)/T⌋`` and ``⌊e · F / 2^(32−b)⌋``, all positive int64."""
    a = w.arguments
    dtype = w.shapes[a["x"]].dtype
    e = _numerators(w, shift_exp(distances(dtype), a["x0"], a["n"]), f"{node.name}_table")
    total = w.op("ReduceSum", e, _last(w), keepdims=1)
    total = clipped_long(w, total, 1, INT32_LIMIT)
    factor = w.op("Div", w.scalar(INT32_LIMIT, _LONG), total)
    shares = w.op("Div", w.op("Mul", e, factor), w.scalar(2 ** (32 - a["bits"]), _LONG))
    return w.cast(shares, w.shapes[node].dtype)


def emit_softmax_log2(w: Writer, node: fx.Node) -> ir.Value:
    """The value of the largest Q with ``ρ ≥ 1.5 · 2^(Q−1)``: comparisons from below."""
    a = w.arguments
    dtype = w.shapes[a["x"]].dtype
    constants = (a[name] for name in ("x0", "b", "c", "n"))
    mantissas, shifts = log_exponentials(distances(dtype), *constants)
    table = (mantissas << shifts).to(_DOUBLE)
    e = _numerators(w, table, f"{node.name}_table")
    total = w.op("ReduceSum", e, _last(w), keepdims=1)
    nothing = w.op("Equal", e, w.scalar(0.0, _DOUBLE))
    divisor = w.op("Where", nothing, w.scalar(1.0, _DOUBLE), e)
    ratio = w.op("Round", w.op("Div", total, divisor))
    ratio = w.op("Where", nothing, w.scalar(2.0**60, _DOUBLE), ratio)
    values = log_values(a["bits"]).to(torch.int32).tolist()
    result = w.scalar(values[0], torch.int32)
    for exponent, value in enumerate(values[1:]):
        reached = w.op("GreaterOrEqual", ratio, w.scalar(1.5 * 2.0**exponent, _DOUBLE))
        result = w.op("Where", reached, w.scalar(value, torch.int32), result)
    return w.cast(result, torch.int16)


# -- GELU ----------------------------------------------------------------------------------


def emit_gelu_i_vit(w: Writer, node: fx.Node) -> ir.Value:
    """``I · ⌊e · ⌊(2^31 − 1)/T⌋ / 2^(32−b)⌋``."""
    a = w.arguments
    dtype = w.shapes[a["x"]].dtype
    low, high = input_range(dtype, a["x_zero_point"])
    table = w.constant(
        shift_exp(torch.arange(high - low + 1), a["x0"], a["n"]), f"{node.name}_table"
    )
    values = centered(w, w.value(a["x"]), a["x_zero_point"], _LONG)
    top = w.op("ReduceMax", values, _last(w), keepdims=1)
    top = w.op("Max", top, w.scalar(0, _LONG))
    e = w.op("Gather", table, w.op("Sub", top, values))
    total = w.op("Add", e, w.op("Gather", table, top))
    total = clipped_long(w, total, 1, INT32_LIMIT)
    factor = w.op("Div", w.scalar(INT32_LIMIT, _LONG), total)
    sigma = w.op("Div", w.op("Mul", e, factor), w.scalar(2 ** (32 - a["bits"]), _LONG))
    return w.cast(w.op("Mul", values, sigma), accumulator_dtype(dtype))


# -- norms ---------------------------------------------------------------------------------


def _inverse_root(w: Writer, v: ir.Value) -> ir.Value:
    """``f · 2^(j − 52)`` as float64 for int64 v in [0, 2^62): `fxquant.integer.roots`.

    v is multiplied by 2^32, 2^16, … 2^2 where it stays below 2^62, which gives j. The root of
    float64 is at most one off, and two comparisons of its square tell.
    """
    zero = w.op("Equal", v, w.scalar(0, _LONG))
    v = w.op("Where", zero, w.scalar(2**60, _LONG), v)
    power: ir.Value | None = None
    for bits in (32, 16, 8, 4, 2):
        short = w.op("Less", v, w.scalar(2 ** (62 - bits), _LONG))
        v = w.op("Mul", v, w.op("Where", short, w.scalar(2**bits, _LONG), w.scalar(1, _LONG)))
        factor = w.op("Where", short, w.scalar(2.0 ** (bits // 2), _DOUBLE), w.scalar(1.0, _DOUBLE))
        power = factor if power is None else w.op("Mul", power, factor)
    assert power is not None
    root = w.cast(w.op("Floor", w.op("Sqrt", w.cast(v, _DOUBLE))), _LONG)
    above = w.cast(w.op("Greater", w.op("Mul", root, root), v), _LONG)
    root = w.op("Sub", root, above)
    following = w.op("Add", root, w.scalar(1, _LONG))
    below = w.cast(w.op("LessOrEqual", w.op("Mul", following, following), v), _LONG)
    root = w.op("Add", root, below)
    found = w.cast(w.op("Div", w.scalar(2**52, _LONG), root), _DOUBLE)
    found = w.op("Where", zero, w.scalar(0.0, _DOUBLE), found)
    scaled = w.op("Mul", found, power)
    return w.op("Mul", scaled, w.scalar(2.0**-52, _DOUBLE))


def _normalized(w: Writer, values: ir.Value, axes: ir.Value, size: int) -> ir.Value:
    """``round_half_even(2^20 · Y/√V)`` of rows of integers in float64."""
    total = w.op("ReduceSum", values, axes, keepdims=1)
    squares = w.cast(w.op("ReduceSum", w.op("Mul", values, values), axes, keepdims=1), _LONG)
    whole = w.cast(total, _LONG)
    variance = w.op("Sub", w.op("Mul", squares, w.scalar(size, _LONG)), w.op("Mul", whole, whole))
    factor = w.op("Mul", _inverse_root(w, variance), w.scalar(2.0**20, _DOUBLE))
    centred = w.op("Sub", w.op("Mul", values, w.scalar(float(size), _DOUBLE)), total)
    return w.op("Round", w.op("Mul", centred, factor))


def _layer_norm(w: Writer, normalize: Callable[[ir.Value, ir.Value, int], ir.Value]) -> ir.Value:
    """`normalize` of the rows in float64, as int64, plus the bias."""
    a = w.arguments
    sizes = w.sizes(a["x"])[-a["dims"] :]
    values = centered(w, w.value(a["x"]), a["x_zero_point"], _DOUBLE)
    size = 1
    for length in sizes:
        size *= length
    result = w.cast(normalize(values, w.numbers(*range(-len(sizes), 0)), size), _LONG)
    if a["bias"] is None:
        return result
    summand = w.constant(w.tensor(a["bias"]), str(a["bias"].target))
    return w.op("Add", result, summand)


def emit_layer_norm_integer(w: Writer, node: fx.Node) -> ir.Value:
    """The zero point cancels: centred values give the same Y and V."""
    return _layer_norm(w, lambda values, axes, size: _normalized(w, values, axes, size))


def emit_layer_norm_power_of_two(w: Writer, node: fx.Node) -> ir.Value:
    """8-bit codes with a power of two for each channel, then the same."""
    powers = 2.0 ** w.tensor(w.arguments["channel_shift"]).to(_DOUBLE)
    factor = w.constant(powers, f"{node.name}_powers")

    def normalize(values: ir.Value, axes: ir.Value, size: int) -> ir.Value:
        rounded = w.op("Round", w.op("Div", values, factor))
        q8 = w.op("Clip", rounded, w.scalar(-128.0, _DOUBLE), w.scalar(127.0, _DOUBLE))
        return _normalized(w, w.op("Mul", q8, factor), axes, size)

    return _layer_norm(w, normalize)


def emit_layer_norm_i_vit(w: Writer, node: fx.Node) -> ir.Value:
    """Ten steps of Newton's method from 2^16."""

    def normalize(values: ir.Value, axes: ir.Value, size: int) -> ir.Value:
        total = w.op("ReduceSum", values, axes, keepdims=1)
        mean = w.op("Round", w.op("Div", total, w.scalar(float(size), _DOUBLE)))
        y = w.op("Sub", values, mean)
        v = w.cast(w.op("ReduceSum", w.op("Mul", y, y), axes, keepdims=1), _LONG)
        k = w.scalar(2**16, _LONG)
        two = w.scalar(2, _LONG)
        for _ in range(10):
            k = w.op("Div", w.op("Add", k, w.op("Div", v, k)), two)
        factor = w.cast(w.op("Div", w.scalar(INT32_LIMIT, _LONG), k), _DOUBLE)
        half = w.op("Mul", w.op("Mul", y, factor), w.scalar(0.5, _DOUBLE))
        return w.op("Floor", half)

    return _layer_norm(w, normalize)


def emit_normalize_integer(w: Writer, node: fx.Node) -> ir.Value:
    """``round_half_even(y · f / 2^(e−15))`` along one dimension, at most 32767."""
    a = w.arguments
    values = centered(w, w.value(a["x"]), a["x_zero_point"], _DOUBLE)
    axes = w.numbers(a["dim"])
    squares = w.cast(w.op("ReduceSum", w.op("Mul", values, values), axes, keepdims=1), _LONG)
    factor = w.op("Mul", _inverse_root(w, squares), w.scalar(2.0**15, _DOUBLE))
    rounded = w.op("Round", w.op("Mul", values, factor))
    bounds = w.scalar(-32767.0, _DOUBLE), w.scalar(32767.0, _DOUBLE)
    return w.cast(w.op("Clip", rounded, *bounds), torch.int16)
