"""Weights that a target could not compute with exactly lose a bit, affine ones up to two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fxquant.simulate.observers import weight_qparams
from fxquant.simulate.quantizers import without_zero_point
from fxquant.spec import QParams, QuantSpec

__all__ = ["WeightRefusal", "fit_weight", "stored_integers"]

WeightRefusal = Callable[[Tensor], str]
"""Why a target cannot compute exactly with int8 integers [O, I, ...]; "" where it can.

Integers in [-63, 63] must never be refused.
"""


def fit_weight(
    path: str, weight: Tensor, spec: QuantSpec, qparams: QParams, refusal: WeightRefusal | None
) -> tuple[QParams, str]:
    """`qparams` as they are, or with fewer bits and a note where `refusal` has a reason."""
    bits, note = spec.bits, ""
    while refusal is not None and (reason := refusal(stored_integers(weight, qparams))):
        bits -= 1
        qparams = weight_qparams(weight, replace(spec, bits=bits), qparams.axis or 0)
        note = f"{path}: weights in {bits} bits, because {reason}"
    return qparams, note


def stored_integers(weight: Tensor, qparams: QParams) -> Tensor:
    """What the integer graph stores for a weight that is rounded to nearest, int8."""
    return without_zero_point(qparams.quantize(weight), qparams)[0]
