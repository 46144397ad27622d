"""The operators of integer transformers once more, row by row in Python's unbounded integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Row = list[int]
LIMIT = 2**31 - 1


def round_half_even(value: Fraction) -> int:
    return round(value)


def rescaled(x: int, multiplier: int, shift: int, zero_point: int, qmin: int, qmax: int) -> int:
    return min(max(round(Fraction(x * multiplier, 2**shift)) + zero_point, qmin), qmax)


def shift_exp(i: int, x0: int, n: int) -> int:
    p = max(i + (i >> 1) - (i >> 4), n * x0)
    q = p // x0
    r = p - x0 * q
    assert x0 < r <= 0
    return max(0, math.floor((Fraction(r, 2) - x0) * 2 ** (n - q)))


def softmax_i_vit(row: Row, x0: int, n: int, bits: int, mask: Sequence[bool] | None = None) -> Row:
    taking_part = list(mask) if mask is not None else [True] * len(row)
    top = max((i for i, part in zip(row, taking_part, strict=True) if part), default=0)
    e = [shift_exp(i - top, x0, n) if p else 0 for i, p in zip(row, taking_part, strict=True)]
    factor = LIMIT // max(1, min(sum(e), LIMIT))
    return [value * factor // 2 ** (32 - bits) for value in e]


def softmax_table(row: Row, table: Row, numerator: int, qmin: int, qmax: int) -> Row:
    top, half = max(row), Fraction(1, 2)
    e = [table[top - q] for q in row]
    total = sum(e)
    codes = [math.floor(Fraction(v * numerator, 256 * total) + half) for v in e]
    return [min(max(code, qmin), qmax) for code in codes]


def log_int_exp(i: int, x0: int, b: int, c: int, n: int) -> int:
    z = max(i, n * x0)
    q = z // x0
    r = z - q * x0
    return max(0, (r * (r + b) + c) * 2 ** (n - q))


def log_int_softmax(row: Row, x0: int, b: int, c: int, n: int, bits: int) -> Row:
    top = max(row)
    e = [log_int_exp(i - top, x0, b, c, n) for i in row]
    total = sum(e)
    result = []
    for value in e:
        if not value:
            result.append(2**bits)
            continue
        ratio = round_half_even(Fraction(total, value))
        exponent = ratio.bit_length() - 1
        if 2 * (ratio - 2**exponent) >= 2**exponent:
            exponent += 1
        result.append(min(exponent, 2**bits))
    return result


def gelu_i_vit(row: Row, x0: int, n: int, bits: int) -> Row:
    top = max(0, *row)
    e0 = shift_exp(-top, x0, n)
    result = []
    for i in row:
        e = shift_exp(i - top, x0, n)
        factor = LIMIT // min(e + e0, LIMIT)
        result.append(i * (e * factor // 2 ** (32 - bits)))
    return result


def ten_steps(v: int) -> int:
    k = 2**16
    for _ in range(10):
        k = (k + v // k) // 2
    return k


def layer_norm_i_vit(row: Row, bias: Row | None) -> Row:
    mean = round_half_even(Fraction(sum(row), len(row)))
    y = [i - mean for i in row]
    factor = LIMIT // ten_steps(sum(value**2 for value in y))
    normalized = [value * factor // 2 for value in y]
    return [a + b for a, b in zip(normalized, bias or [0] * len(row), strict=True)]


def inverse_root(v: int) -> Fraction:
    if not v:
        return Fraction(0)
    j = (62 - v.bit_length()) // 2
    return Fraction(2**52 // math.isqrt(v * 4**j) * 2**j, 2**52)


def layer_norm_integer(row: Row, bias: Row | None = None) -> Row:
    size, total = len(row), sum(row)
    inverse = inverse_root(size * sum(q * q for q in row) - total**2)
    normalized = [round_half_even((size * q - total) * inverse * 2**20) for q in row]
    return [a + b for a, b in zip(normalized, bias or [0] * size, strict=True)]


def layer_norm_power_of_two(row: Row, shifts: Row) -> Row:
    y = []
    for q, shift in zip(row, shifts, strict=True):
        code = round_half_even(Fraction(q, 2**shift))
        y.append(min(max(code, -128), 127) << shift)
    return layer_norm_integer(y)


def normalize_integer(row: Row) -> Row:
    inverse = inverse_root(sum(q * q for q in row))
    return [min(max(round_half_even(q * inverse * 2**15), -32767), 32767) for q in row]
