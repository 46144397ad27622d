"""Integer graph → direct calls of torch's int8 kernels on torch quantized tensors.

A table from operator to lowering. What torch has no right kernel for keeps its
`torch.ops.fxquant` operator on plain integers; it stays exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.backends.x86.elementwise import (
    ON_QUANTIZED,
    lower_channel_affine,
    lower_dequantize,
    lower_lookup,
    lower_max_pool,
    lower_movement,
    lower_pair,
    lower_pool,
    lower_quantize,
)
from fxquant.backends.x86.integers import (
    lower_add_rescaled,
    lower_rescale,
    lower_softmax_table,
)
from fxquant.backends.x86.layers import (
    lower_conv,
    lower_linear_dynamic,
    lower_recurrent,
    lower_weight,
)
from fxquant.backends.x86.linear import lower_activated_linear, lower_linear
from fxquant.backends.x86.lowering import Lower, Lowering, first_of
from fxquant.backends.x86.matmul import lower_matmul, lower_weighted_mean

__all__ = ["lower_to_kernels"]

OPS: Any = torch.ops.fxquant

# Transposed convolutions are missing: only QNNPACK's kernel is exact, in one and two dimensions
# and without groups, and it is many times slower than the others. The reference is no slower.
LOWERINGS: dict[Any, Lower] = {
    OPS.quantize.default: first_of(lower_activated_linear, lower_quantize),
    OPS.dequantize.default: lower_dequantize,
    OPS.dequantize_weight.default: lower_weight,
    OPS.conv.default: lower_conv,
    OPS.linear.default: lower_linear,
    OPS.matmul.default: lower_matmul,
    OPS.weighted_mean.default: lower_weighted_mean,
    OPS.add.default: lower_pair("add"),
    OPS.mul.default: lower_pair("mul"),
    OPS.channel_affine.default: lower_channel_affine,
    OPS.lookup.default: lower_lookup,
    OPS.avg_pool.default: lower_pool,
    OPS.adaptive_avg_pool.default: lower_pool,
    OPS.mean.default: lower_pool,
    OPS.max_pool.default: lower_max_pool,
    OPS.linear_dynamic.default: lower_linear_dynamic,
    OPS.lstm_dynamic.default: lower_recurrent,
    OPS.gru_dynamic.default: lower_recurrent,
    **dict.fromkeys(ON_QUANTIZED, lower_movement),
}

WIDE: dict[Any, Lower] = {
    OPS.rescale.default: lower_rescale,
    OPS.add_rescaled.default: lower_add_rescaled,
    OPS.softmax_table.default: lower_softmax_table,
}
"""Operators whose values may have more than 8 bits."""


def lower_to_kernels(integer: fx.GraphModule, keep: frozenset[str] = frozenset()) -> fx.GraphModule:
    """The graph of kernel calls of an integer graph, weights prepacked.

    Nodes that keep the reference operator have ``meta["kernel"] == "reference"``; every node
    that stands for an integer node has its name in ``meta["integer"]``.
    """
    return Lowering(integer, LOWERINGS, WIDE, keep).lower()
