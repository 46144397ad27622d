"""CPUs without VNNI add pairs of u8 × s8 products in 16 bits, which saturate.

`vpmaddubsw` adds the products of two neighbouring values of the reduction into an int16. A layer
is safe there when 255 · |w₁ + w₂| stays within int16 for every such pair of its weights, taken
apart by sign. Where it does not, the layer's weights lose one bit: 255 · 2 · 63 = 32,130 fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.simulate.weight_fit import WeightRefusal

__all__ = ["cpu_has_vnni", "pair_sums_fit", "weight_refusal"]

_INT16 = 32767


def cpu_has_vnni() -> bool:
    """Whether this CPU multiplies u8 × s8 into int32 without saturation."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(
        torch.cpu, "_is_avx512_vnni_supported", None
    )
    return bool(supported()) if supported is not None else False


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
    """Which weights this CPU cannot compute with exactly; None where it can with all."""
    return None if cpu_has_vnni() else _refuse


def _refuse(codes: Tensor) -> str:
    if codes.dim() < 2 or pair_sums_fit(codes):
        return ""
    return "this CPU has no VNNI and pairs of its products could saturate"
