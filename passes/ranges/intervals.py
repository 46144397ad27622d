"""Arithmetic on intervals of real numbers, each with the reason why it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "UNBOUNDED",
    "Interval",
    "add",
    "because",
    "divide",
    "hull",
    "interval",
    "multiply",
    "negate",
]

_LONGEST_PROOF = 60


@dataclass(frozen=True)
class Interval:
    """Every element of a value lies in [`low`, `high`]; `proof` says why ("" where unbounded).

    The bounds are those of real arithmetic. In floats, rounding may overstep a bound other than
    0, but not 0: rounding keeps signs.
    """

    low: float
    high: float
    proof: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"no interval: [{self.low}, {self.high}]")

    @property
    def non_negative(self) -> bool:
        """Whether no element is below zero."""
        return self.low >= 0

    @property
    def non_positive(self) -> bool:
        """Whether no element is above zero."""
        return self.high <= 0

    def __str__(self) -> str:
        left = "[" if math.isfinite(self.low) else "("
        right = "]" if math.isfinite(self.high) else ")"
        bounds = ", ".join(f"{bound:.6g}" for bound in (self.low, self.high))
        return f"{left}{bounds.replace('inf', '∞')}{right}"


UNBOUNDED = Interval(-math.inf, math.inf)


def interval(low: float, high: float, proof: str) -> Interval:
    """An interval from computed bounds: UNBOUNDED where they say nothing."""
    # Infinite bounds stand for finite values: their differences are unknown, and so is what
    # lies beyond the largest float.
    if math.isnan(low) or low == math.inf:
        low = -math.inf
    if math.isnan(high) or high == -math.inf:
        high = math.inf
    return UNBOUNDED if (low, high) == (-math.inf, math.inf) else Interval(low, high, proof)


def because(operation: str, *operands: Interval) -> str:
    """The proof ``operation of proofs``, cut to the operands' own operations where it is long."""
    proofs = [operand.proof or "an unbounded value" for operand in operands]
    text = f"{operation} of {', '.join(proofs)}"
    if len(text) > _LONGEST_PROOF:
        heads = dict.fromkeys(proof.partition(" of ")[0] for proof in proofs)
        text = f"{operation} of {', '.join(heads)}"
    return text if len(text) <= _LONGEST_PROOF else f"{operation} of {len(proofs)} values"


def hull(operation: str, *operands: Interval) -> Interval:
    """The smallest interval that holds all `operands`."""
    low, high = min(each.low for each in operands), max(each.high for each in operands)
    return interval(low, high, because(operation, *operands))


def negate(a: Interval) -> Interval:
    """``−a``."""
    return Interval(-a.high, -a.low, a.proof)


def add(a: Interval, b: Interval) -> Interval:
    """``a + b``."""
    proof = because("sum", a, b)
    if a.non_negative and b.non_negative:
        proof = "sum of non-negatives"
    return interval(a.low + b.low, a.high + b.high, proof)


def multiply(a: Interval, b: Interval) -> Interval:
    """``a · b``."""
    proof = because("product", a, b)
    if a.non_negative and b.non_negative:
        proof = "product of non-negatives"
    elif a.non_positive and b.non_positive:
        proof = "product of non-positives"
    corners = [_times(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return interval(min(corners), max(corners), proof)


def divide(a: Interval, b: Interval) -> Interval:
    """``a / b``; unbounded unless `b` has one sign."""
    if b.low < 0:
        a, b = negate(a), negate(b)
    if b.low < 0 or b.high == 0:
        return UNBOUNDED
    inverse = Interval(1 / b.high, 1 / b.low if b.low > 0 else math.inf, b.proof)
    quotient = multiply(a, inverse)
    proof = "quotient of non-negatives" if a.non_negative else because("quotient", a, b)
    return interval(quotient.low, quotient.high, proof)


def _times(x: float, y: float) -> float:
    # An infinite bound stands for finite values, and zero times those is zero.
    return 0.0 if x == 0 or y == 0 else x * y
