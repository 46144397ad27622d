"""From a range of values to scale and zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.spec import LARGEST_SCALE, SMALLEST_SCALE, QParams, QuantSpec

# Where all values are 0 every scale is exact. This one keeps a layer's bias, which is rounded to
# the product of the scales of weight and input, both precise and inside int32.
SCALE_OF_ZEROS = 2.0**-16


def fit_codes(spec: QuantSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point that put the range ``[low, high]`` onto a spec's codes.

    The range is widened to hold 0, which is then exact. Symmetric codes cover the larger side.

    Args:
        spec: the form of the codes.
        low: lower bounds, float64 of any shape.
        high: upper bounds, of the same shape.

    Returns:
        The scale, float64 holding float32 values, and the zero point, float64 holding integers.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    bottom, top = spec.fit_qmin, spec.fit_qmax
    if spec.one_sided:
        zero_point = torch.zeros_like(high)
        scale = high / top
    elif spec.scheme == "symmetric":
        middle = 0 if spec.signed else (top + 1) // 2
        zero_point = torch.full_like(high, middle)
        scale = torch.maximum(-low, high) / (top - middle)
    else:
        # Halved, so that the difference of two huge bounds stays finite.
        scale = (high / 2 - low / 2) / (top - bottom) * 2
        zero_point = torch.zeros_like(high)
    scale = torch.where(scale == 0, SCALE_OF_ZEROS, scale.clamp(SMALLEST_SCALE, LARGEST_SCALE))
    scale = scale.float().double()
    if not spec.one_sided and spec.scheme == "affine":
        zero_point = (bottom - low / scale).round().clamp(bottom, top)
    return scale, zero_point


def qparams_from_range(
    spec: QuantSpec, low: Tensor, high: Tensor, axis: int | None = None
) -> QParams:
    """The parameters for a range, float64 ``[C]`` bounds, or ``[1]`` without an axis."""
    scale, zero_point = fit_codes(spec, low, high)
    return QParams(
        scale=scale.float(),
        zero_point=zero_point.to(torch.int32),
        qmin=spec.qmin,
        qmax=spec.qmax,
        dtype=spec.dtype,
        axis=axis,
    )
