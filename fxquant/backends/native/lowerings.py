"""Which function lowers which operation."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.backends.native import (
    codes,
    dynamic,
    elementwise,
    float_windows,
    floats,
    layers,
    movement,
    products,
    rows,
    windows,
)
from fxquant.backends.native.planner import Lower
from passes import softmax_numerators, tensor_info

__all__ = ["APPROXIMATED", "LOWERINGS", "torch_has_the_bits"]

OPS: Any = torch.ops.fxquant

LOWERINGS: Mapping[Any, Lower] = {
    OPS.quantize.default: codes.lower_quantize,
    OPS.dequantize.default: codes.lower_dequantize,
    OPS.lookup.default: codes.lower_lookup,
    OPS.add.default: elementwise.lower_pair,
    OPS.mul.default: elementwise.lower_pair,
    OPS.mul_accumulate.default: elementwise.lower_pair,
    OPS.add_rescaled.default: elementwise.lower_add_rescaled,
    OPS.channel_affine.default: elementwise.lower_channel_affine,
    OPS.rescale.default: elementwise.lower_rescale,
    OPS.conv.default: layers.lower_layer,
    OPS.conv_transpose.default: layers.lower_layer,
    OPS.linear.default: layers.lower_layer,
    OPS.conv_accumulate.default: layers.lower_layer,
    OPS.linear_accumulate.default: layers.lower_layer,
    OPS.max_pool.default: windows.lower_windows,
    OPS.avg_pool.default: windows.lower_windows,
    OPS.adaptive_avg_pool.default: windows.lower_windows,
    OPS.mean.default: windows.lower_windows,
    OPS.sum_accumulate.default: windows.lower_windows,
    OPS.matmul.default: products.lower_product,
    OPS.weighted_mean.default: products.lower_product,
    OPS.matmul_accumulate.default: products.lower_product,
    OPS.softmax_table.default: rows.lower_softmax_codes,
    OPS.softmax_i_vit.default: rows.lower_softmax_codes,
    OPS.softmax_log2.default: rows.lower_softmax_codes,
    OPS.gelu_i_vit.default: rows.lower_shift_gelu,
    OPS.layer_norm_integer.default: rows.lower_norm,
    OPS.layer_norm_i_vit.default: rows.lower_norm,
    OPS.layer_norm_power_of_two.default: rows.lower_norm,
    OPS.normalize_integer.default: rows.lower_norm,
    OPS.linear_dynamic.default: dynamic.lower_linear_dynamic,
    OPS.lstm_dynamic.default: dynamic.lower_recurrent,
    OPS.gru_dynamic.default: dynamic.lower_recurrent,
    F.layer_norm: floats.lower_layer_norm,
    F.softmax: floats.lower_softmax,
    torch.softmax: floats.lower_softmax,
    softmax_numerators: floats.lower_softmax,
    F.gelu: floats.lower_float_function,
    F.relu: floats.lower_float_function,
    torch.relu: floats.lower_float_function,
    F.relu6: floats.lower_clamp,
    F.hardtanh: floats.lower_clamp,
    torch.clamp: floats.lower_clamp,
    torch.add: floats.lower_float_pair,
    torch.sub: floats.lower_float_pair,
    torch.mul: floats.lower_float_pair,
    torch.div: floats.lower_float_pair,
    F.max_pool1d: float_windows.lower_float_pool,
    F.max_pool2d: float_windows.lower_float_pool,
    F.avg_pool1d: float_windows.lower_float_pool,
    F.avg_pool2d: float_windows.lower_float_pool,
    F.adaptive_avg_pool1d: float_windows.lower_float_pool,
    F.adaptive_avg_pool2d: float_windows.lower_float_pool,
    torch.mean: float_windows.lower_float_mean,
    torch.sum: float_windows.lower_float_mean,
    torch.cat: movement.lower_cat,
    torch.stack: movement.lower_cat,
    torch.channel_shuffle: movement.lower_shuffle,
    operator.getitem: movement.lower_item,
    **dict.fromkeys(
        (
            torch.reshape,
            torch.flatten,
            torch.unflatten,
            torch.permute,
            torch.transpose,
            torch.chunk,
            torch.split,
            torch.squeeze,
            torch.unsqueeze,
            torch.roll,
            torch.flip,
            torch.narrow,
            torch.select,
            F.pad,
            F.interpolate,
            F.pixel_shuffle,
            F.pixel_unshuffle,
            "repeat",
            "reshape",
            "expand",
            "contiguous",
        ),
        movement.lower_movement,
    ),
}

_AVERAGES = (
    F.avg_pool1d,
    F.avg_pool2d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    torch.mean,
    torch.sum,
)
APPROXIMATED = (
    F.gelu,
    F.softmax,
    torch.softmax,
    softmax_numerators,
    F.layer_norm,
    OPS.lstm_dynamic.default,
    OPS.gru_dynamic.default,
    *_AVERAGES,
)
"""Float operations whose last bits are not torch's; the others are single ones of IEEE 754."""


def torch_has_the_bits(node: fx.Node) -> bool:
    """Whether a float operation is left to torch as long as there is torch.

    Its bits are the reference's then. Torch's order of additions differs from processor to
    processor, so that no kernel can have them. Softmax along rows is worth the difference.
    """
    if node.target in (F.softmax, torch.softmax):
        info = tensor_info(node)
        dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return info is None or dim % len(info.shape) != len(info.shape) - 1
    return node.target in _AVERAGES
