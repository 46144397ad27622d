"""What every integer operator means: exact, pure torch, and the judge of all other kernels.

The functions have the arguments of the operators ``torch.ops.fxquant.*`` (see
`fxquant.kernels.schema`) and are their implementation on the CPU. An integer tensor of scale s and
zero point z has the value s · (q − z). All sums are exact; every float32 product is rounded on its
own; rounding is half to even. The operators named ``*_accumulate``, `rescale`, `add_rescaled` and
the integer forms of softmax, GELU and the norms take no float at all.
"""

from fxquant.integer.accumulate import conv_accumulate, linear_accumulate, sum_accumulate
from fxquant.integer.bounds import largest_bias
from fxquant.integer.convolution import conv, conv_transpose
from fxquant.integer.dynamic import gru_dynamic, linear_dynamic, lstm_dynamic
from fxquant.integer.elementwise import add, channel_affine, lookup, mul
from fxquant.integer.gelu import gelu_i_vit, shift_gelu_constants
from fxquant.integer.layer_norm import (
    guarded_gamma,
    layer_norm_bias,
    layer_norm_i_vit,
    layer_norm_integer,
    layer_norm_power_of_two,
    layer_norm_scale,
)
from fxquant.integer.linear import linear
from fxquant.integer.matmul import matmul, matmul_accumulate, mul_accumulate, weighted_mean
from fxquant.integer.normalize import NORMALIZE_SCALE, normalize_integer
from fxquant.integer.pooling import adaptive_avg_pool, avg_pool, max_pool, mean
from fxquant.integer.quantize import dequantize, dequantize_weight, quantize
from fxquant.integer.rescale import add_rescaled, dyadic, dyadic_tensors, rescale
from fxquant.integer.softmax import (
    exp_table,
    log_int_softmax,
    log_softmax_constants,
    shiftmax_constants,
    softmax_i_vit,
    softmax_log2,
    softmax_table,
)
from fxquant.integer.tables import build_table

__all__ = [
    "NORMALIZE_SCALE",
    "adaptive_avg_pool",
    "add",
    "add_rescaled",
    "avg_pool",
    "build_table",
    "channel_affine",
    "conv",
    "conv_accumulate",
    "conv_transpose",
    "dequantize",
    "dequantize_weight",
    "dyadic",
    "dyadic_tensors",
    "exp_table",
    "gelu_i_vit",
    "gru_dynamic",
    "guarded_gamma",
    "largest_bias",
    "layer_norm_bias",
    "layer_norm_i_vit",
    "layer_norm_integer",
    "layer_norm_power_of_two",
    "layer_norm_scale",
    "linear",
    "linear_accumulate",
    "linear_dynamic",
    "log_int_softmax",
    "log_softmax_constants",
    "lookup",
    "lstm_dynamic",
    "matmul",
    "matmul_accumulate",
    "max_pool",
    "mean",
    "mul",
    "mul_accumulate",
    "normalize_integer",
    "quantize",
    "rescale",
    "shift_gelu_constants",
    "shiftmax_constants",
    "softmax_i_vit",
    "softmax_log2",
    "softmax_table",
    "sum_accumulate",
    "weighted_mean",
]
