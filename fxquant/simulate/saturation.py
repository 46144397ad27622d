"""CPUs without VNNI add pairs of u8 × s8 products in 16 bits, which saturate.

`vpmaddubsw` adds the products of two neighbouring values of the reduction into an int16. A layer
is safe there when 255 · |w₁ + w₂| stays within int16 for every such pair of its weights, taken
apart by sign. Where it does not, the layer's weights lose one bit: 255 · 2 · 63 = 32,130 fits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxquant.simulate.observers import weight_qparams
from fxquant.spec import QParams, QuantSpec

__all__ = ["cpu_has_vnni", "fit_pair_sums", "pair_sums_fit"]

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


def fit_pair_sums(
    path: str, weight: Tensor, spec: QuantSpec, qparams: QParams
) -> tuple[QParams, str]:
    """`qparams` as they are, or with one bit less and a note where this CPU would saturate."""
    if cpu_has_vnni() or spec.bits < 8 or pair_sums_fit(qparams.quantize(weight)):
        return qparams, ""
    reduced = weight_qparams(weight, replace(spec, bits=7), qparams.axis or 0)
    return reduced, (
        f"{path}: weights in 7 bits, because this CPU has no VNNI and pairs of its products "
        "could saturate"
    )
