"""Weights that a target could not compute with exactly lose one bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fxquant.simulate.observers import weight_qparams
from fxquant.spec import QParams, QuantSpec

__all__ = ["WeightRefusal", "fit_weight"]

WeightRefusal = Callable[[Tensor], str]
"""Why a target cannot compute exactly with int8 codes [O, I, ...]; "" where it can.

Codes of 7 bits must never be refused.
"""


def fit_weight(
    path: str, weight: Tensor, spec: QuantSpec, qparams: QParams, refusal: WeightRefusal | None
) -> tuple[QParams, str]:
    """`qparams` as they are, or with one bit less and a note where `refusal` has a reason."""
    if refusal is None or spec.bits < 8:
        return qparams, ""
    reason = refusal(qparams.quantize(weight))
    if not reason:
        return qparams, ""
    reduced = weight_qparams(weight, replace(spec, bits=7), qparams.axis or 0)
    return reduced, f"{path}: weights in 7 bits, because {reason}"
