"""What every integer operator means: exact, pure torch, and the judge of all other kernels.

The functions have the arguments of the operators ``torch.ops.fxquant.*`` (see
`fxquant.kernels.schema`) and are their implementation on the CPU. An integer tensor of scale s and
zero point z has the value s · (q − z). All sums are exact; every float32 product is rounded on its
own; rounding is half to even.
"""

from fxquant.integer.bounds import largest_bias
from fxquant.integer.convolution import conv, conv_transpose
from fxquant.integer.dynamic import gru_dynamic, linear_dynamic, lstm_dynamic
from fxquant.integer.elementwise import add, channel_affine, lookup, mul
from fxquant.integer.linear import linear
from fxquant.integer.pooling import adaptive_avg_pool, avg_pool, max_pool, mean
from fxquant.integer.quantize import dequantize, dequantize_weight, quantize, requantize
from fxquant.integer.tables import build_table

__all__ = [
    "adaptive_avg_pool",
    "add",
    "avg_pool",
    "build_table",
    "channel_affine",
    "conv",
    "conv_transpose",
    "dequantize",
    "dequantize_weight",
    "gru_dynamic",
    "largest_bias",
    "linear",
    "linear_dynamic",
    "lookup",
    "lstm_dynamic",
    "max_pool",
    "mean",
    "mul",
    "quantize",
    "requantize",
]
