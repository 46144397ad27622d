"""Modules that simulate quantization in float."""

from fxquant.simulate.quantizers.activation import ActivationQuantizer
from fxquant.simulate.quantizers.affine import AffineQuantizer
from fxquant.simulate.quantizers.weight import (
    RoundedWeightQuantizer,
    WeightQuantizer,
    without_zero_point,
)

__all__ = [
    "ActivationQuantizer",
    "AffineQuantizer",
    "RoundedWeightQuantizer",
    "WeightQuantizer",
    "without_zero_point",
]
