"""Which function writes the ONNX nodes of which operation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

import fxquant.kernels  # noqa: F401  (registers torch.ops.fxquant)
from fxquant.export.onnx import (
    codes,
    dynamic,
    elementwise,
    layers,
    pools,
    products,
    recurrent,
    rescale,
    rows,
    sums,
)
from fxquant.export.onnx.floats import FLOATS
from fxquant.export.onnx.movement import MOVEMENT, emit_getitem
from fxquant.export.onnx.writer import Writer
from fxquant.to_integer.functional import pair

__all__ = ["EMITTERS", "Emit"]

OPS: Any = torch.ops.fxquant

Emit = Callable[[Writer, fx.Node], Any]
"""Writes what stands for a node: a value, or a tuple of several."""

EMITTERS: Mapping[Any, Emit] = {
    OPS.quantize.default: codes.emit_quantize,
    OPS.dequantize.default: codes.emit_dequantize,
    OPS.dequantize_weight.default: codes.emit_dequantize_weight,
    OPS.lookup.default: codes.emit_lookup,
    OPS.conv.default: layers.emit_conv,
    OPS.conv_transpose.default: layers.emit_conv_transpose,
    OPS.linear.default: layers.emit_linear,
    OPS.add.default: elementwise.emit_add,
    OPS.mul.default: elementwise.emit_mul,
    OPS.channel_affine.default: elementwise.emit_channel_affine,
    OPS.matmul.default: products.emit_matmul,
    OPS.weighted_mean.default: products.emit_weighted_mean,
    OPS.max_pool.default: pools.emit_max_pool,
    OPS.avg_pool.default: pools.emit_avg_pool,
    OPS.adaptive_avg_pool.default: pools.emit_adaptive_avg_pool,
    OPS.mean.default: pools.emit_mean,
    OPS.conv_accumulate.default: sums.emit_conv_accumulate,
    OPS.linear_accumulate.default: sums.emit_linear_accumulate,
    OPS.matmul_accumulate.default: sums.emit_matmul_accumulate,
    OPS.mul_accumulate.default: sums.emit_mul_accumulate,
    OPS.sum_accumulate.default: pools.emit_sum_accumulate,
    OPS.linear_dynamic.default: dynamic.emit_linear_dynamic,
    OPS.lstm_dynamic.default: recurrent.emit_lstm_dynamic,
    OPS.gru_dynamic.default: recurrent.emit_gru_dynamic,
    OPS.rescale.default: rescale.emit_rescale,
    OPS.add_rescaled.default: rescale.emit_add_rescaled,
    OPS.softmax_table.default: rows.emit_softmax_table,
    OPS.softmax_i_vit.default: rows.emit_softmax_i_vit,
    OPS.softmax_log2.default: rows.emit_softmax_log2,
    OPS.gelu_i_vit.default: rows.emit_gelu_i_vit,
    OPS.layer_norm_integer.default: rows.emit_layer_norm_integer,
    OPS.layer_norm_i_vit.default: rows.emit_layer_norm_i_vit,
    OPS.layer_norm_power_of_two.default: rows.emit_layer_norm_power_of_two,
    OPS.normalize_integer.default: rows.emit_normalize_integer,
    operator.getitem: emit_getitem,
    pair: lambda w, node: tuple(w.values[part] for part in node.all_input_nodes),
    **MOVEMENT,
    **FLOATS,
}
