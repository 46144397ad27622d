"""What each operation says about the range of its result: the table behind InferRanges."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from passes.attention.functions import masked_softmax, softmax_numerators
from passes.layers.fused_layer import add_relu
from passes.ranges import activations, arithmetic, windows
from passes.ranges.operands import Rule, at_least, joined, kept, taken, within

__all__ = ["RULES"]


_KEEPING: tuple[Any, ...] = (
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.roll, torch.flip, torch.unflatten, torch.swapaxes, torch.movedim),
    *(F.channel_shuffle, F.pixel_shuffle, F.pixel_unshuffle, torch.tile, torch.clone),
    *(torch.mean, torch.amax, torch.amin, torch.index_select, torch.gather),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *("contiguous", "clone", "detach", "view", "reshape", "expand", "expand_as", "repeat"),
    *("permute", "transpose", "flatten", "squeeze", "unsqueeze", "unfold", "float", "to"),
)

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_KEEPING, kept),
    **dict.fromkeys((operator.getitem, torch.chunk, torch.split, torch.unbind), taken),
    **dict.fromkeys((torch.narrow, torch.select, torch.tensor_split), taken),
    **dict.fromkeys((torch.cat, torch.stack), joined),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), windows.max_pool),
    **dict.fromkeys(
        (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), windows.max_pool
    ),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), windows.avg_pool),
    F.pad: windows.pad,
    F.interpolate: windows.interpolate,
    torch.where: arithmetic.where,
    # Activations; the minima are rounded away from zero.
    F.relu: activations.relu,
    add_relu: activations.relu_of_sum,
    F.relu6: within(0, 6),
    **dict.fromkeys((F.hardtanh, torch.clamp), activations.clamp),
    **dict.fromkeys((torch.sigmoid, F.hardsigmoid, F.softmax, torch.softmax), within(0, 1)),
    masked_softmax: within(0, 1),
    softmax_numerators: within(0, 1),
    torch.tanh: activations.tanh,
    F.hardswish: activations.gated(-0.375),
    F.silu: activations.gated(-0.2785),
    F.gelu: activations.gated(-0.1701),
    F.mish: activations.gated(-0.3089),
    F.leaky_relu: activations.leaky_relu,
    **dict.fromkeys((F.elu, F.celu), activations.elu),
    **dict.fromkeys((F.softplus, torch.exp, torch.sqrt, torch.rsqrt), at_least(0)),
    **dict.fromkeys((torch.var, torch.std, torch.norm, torch.linalg.vector_norm), at_least(0)),
    # Arithmetic.
    torch.add: arithmetic.add,
    torch.sub: arithmetic.subtract,
    torch.mul: arithmetic.multiply,
    torch.div: arithmetic.divide,
    torch.neg: arithmetic.negative,
    torch.abs: arithmetic.absolute,
    torch.square: arithmetic.square,
    torch.pow: arithmetic.power,
    torch.maximum: arithmetic.maximum,
    torch.minimum: arithmetic.minimum,
    torch.sum: arithmetic.total,
    **dict.fromkeys((torch.matmul, torch.bmm), arithmetic.matmul),
}
