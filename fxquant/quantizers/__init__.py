"""Modules that simulate quantization in float."""

from fxquant.quantizers.activation import ActivationQuantizer
from fxquant.quantizers.affine import AffineQuantizer
from fxquant.quantizers.weight import RoundedWeightQuantizer, WeightQuantizer

__all__ = ["ActivationQuantizer", "AffineQuantizer", "RoundedWeightQuantizer", "WeightQuantizer"]
