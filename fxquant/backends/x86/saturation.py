"""Without VNNI, kernels add pairs of u8 × s8 products in 16 bits, which saturate.

`vpmaddubsw` adds the products of two neighbouring values of the reduction into an int16. A layer
is safe there when 255 · |w₁ + w₂| stays within int16 for every such pair of its weights, taken
apart by sign. Where it does not, the layer's weights lose one bit: 255 · 2 · 63 = 32,130 fits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fxquant.backends.x86.kernels import as_quantized, pack_conv, pack_linear, quantized_weight
from fxquant.simulate.weight_fit import WeightRefusal

__all__ = ["kernels_saturate", "pair_sums_fit", "weight_refusal"]

_INT16 = 32767


@cache
def kernels_saturate() -> bool:
    """Whether torch's kernels lose what pairs of u8 × s8 products sum to beyond int16.

    The kernels are asked, not the CPU: they may be held below what it has (ONEDNN_MAX_CPU_ISA).
    """
    x = as_quantized(torch.full((1, 2, 1, 1), 255, dtype=torch.uint8), 1.0, 0)
    ones = torch.ones(1)
    weight = torch.full((16, 2, 1, 1), 127, dtype=torch.int8)
    conv = pack_conv(
        quantized_weight(weight, ones, None),
        None,
        [[1, 1], [0, 0], [1, 1]],
        1,
        engine_name="onednn",
    )
    linear = pack_linear(quantized_weight(weight.flatten(1), ones, None), None)
    # The sum, 2 · 255 · 127, is the largest code of this grid.
    scale = 2.0 * 127
    found = (
        torch.ops.quantized.conv2d(x, conv, scale, 0),
        torch.ops.quantized.linear(x.flatten(1), linear, scale, 0),
    )
    return any(bool((y.int_repr() != 255).any()) for y in found)


def pair_sums_fit(weight: Tensor) -> bool:
    """Whether no pair of neighbours of the reduction can saturate; `weight` is int8 [O, I, ...].

    The kernels pair input channels 2i and 2i + 1 at one position of the window; with an odd
    count the last one stands alone, and so does every value of a depthwise convolution, whose
    products are widened before they are added.
    """
    pairs = weight.to(torch.int32)
    if pairs.shape[1] < 2:
        return True
    pairs = pairs[:, : pairs.shape[1] // 2 * 2]
    pairs = pairs.reshape(pairs.shape[0], -1, 2, *pairs.shape[2:])
    high = pairs.clamp(min=0).sum(2).max()
    low = pairs.clamp(max=0).sum(2).min()
    return bool(255 * high <= _INT16) and bool(255 * low >= -_INT16 - 1)


def weight_refusal() -> WeightRefusal | None:
    """Which weights the kernels cannot compute with exactly; None where they can with all."""
    return _refuse if kernels_saturate() else None


def _refuse(codes: Tensor) -> str:
    if codes.dim() < 2 or pair_sums_fit(codes):
        return ""
    return "without VNNI pairs of products could saturate in torch's kernels"
