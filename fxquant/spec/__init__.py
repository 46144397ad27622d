"""What a quantized value looks like: `QuantSpec` before its range is known, `QParams` after."""

from fxquant.spec.observers import OBSERVERS, Options, check_options, split_observer
from fxquant.spec.qparams import LARGEST_SCALE, SMALLEST_SCALE, QParams
from fxquant.spec.quant_spec import Granularity, QuantSpec, Scheme

__all__ = [
    "LARGEST_SCALE",
    "OBSERVERS",
    "SMALLEST_SCALE",
    "Granularity",
    "Options",
    "QParams",
    "QuantSpec",
    "Scheme",
    "check_options",
    "split_observer",
]
