"""Layer normalization on integers: I-ViT's as published, a converging one, and FQ-ViT's.

A result is ``normalized + ⌊(β/γ)/S'⌋`` as int64, of scale ``S' · γ`` for each channel, with S' from
`layer_norm_scale`. There is no epsilon: a row of equal values normalizes to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.errors import CompileError
from fxquant.integer.accumulators import WIDE, in_chunks
from fxquant.integer.bounds import INT32_LIMIT, check_codes, largest_operand
from fxquant.integer.roots import FACTOR_BITS, inverse_root

_OUTPUT_BITS = 20
_LARGEST_BIAS = 2**51
_LEAST_GAMMA = 2.0**-12


def layer_norm_scale(method: str, normalized_size: int) -> float:
    """S', the scale of a normalized value: ``√N / 2^30`` for "i-vit", 2^-20 for the others."""
    if method == "i-vit":
        return math.sqrt(normalized_size) / 2**30
    if method in ("integer", "power_of_two"):
        return 2.0**-_OUTPUT_BITS
    raise CompileError(
        f"there is no layer norm {method!r} on integers; use i-vit, integer or power_of_two"
    )


def guarded_gamma(gamma: Tensor) -> Tensor:
    """γ as float64, moved away from 0 to 2^-12 of the largest |γ| where it is smaller.

    The bias of a channel is divided by γ and the result multiplied by it again, so both must use
    this one. A channel that is moved is at most 2^-12 of the largest off.
    """
    wide = gamma.to(torch.float64)
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    least = (largest or 1.0) * _LEAST_GAMMA
    return torch.where(wide.abs() < least, torch.where(wide < 0, -least, least), wide)


def layer_norm_bias(beta: Tensor, gamma: Tensor, scale: float) -> Tensor:
    """``⌊(β/γ)/S'⌋`` as int64 of β's shape; ``gamma`` is a `guarded_gamma`.

    Saturates at ±2^51, which `rescale` still takes.
    """
    steps = beta.to(torch.float64) / gamma.to(torch.float64) / scale
    return steps.floor().clamp(-_LARGEST_BIAS, _LARGEST_BIAS).to(torch.int64)


def layer_norm_i_vit(x: Tensor, x_zero_point: int, bias: Tensor | None, dims: int) -> Tensor:
    """I-ViT's I-LayerNorm over the last ``dims`` dimensions of codes, as published: int64.

    ``I = q − z``, ``μ = round_half_even(mean)``, ``y = I − μ``, ``v = Σy²``; from k = 2^16 ten
    times ``k = ⌊(k + ⌊v/k⌋)/2⌋``; ``F = ⌊(2^31 − 1)/k⌋``; ``⌊y · F / 2⌋`` of scale √N / 2^30. Ten
    steps converge for v between about 2^15 and 2^47, and F has few bits left where v is large. k
    is never below 64: v = 0 halves it ten times. ``bias`` is int64 of the normalized shape. Source:
    Li and Gu, ICCV 2023.
    """
    check_codes("layer_norm_i_vit", x)
    size = _checked_size("layer_norm_i_vit", x, bias, dims, largest_operand(x.dtype, x_zero_point))

    def normalize(values: Tensor) -> Tensor:
        values.sub_(x_zero_point)
        # Rounds like the exact quotient: |Σ| < 2^52.
        y = values.sub_((values.sum(-1, keepdim=True) / size).round_())
        v = (y * y).sum(-1, keepdim=True).to(torch.int64)
        k = torch.full_like(v, 2**16)
        for _ in range(10):
            k = (k + v // k) >> 1
        factor = (INT32_LIMIT // k).to(torch.float64)
        return y.mul_(factor).mul_(0.5).floor_()

    return _over_rows(x, bias, size, normalize)


def layer_norm_integer(x: Tensor, x_zero_point: int, bias: Tensor | None, dims: int) -> Tensor:
    """Layer normalization with a converging integer square root: int64 of scale 2^-20.

    With the exact integers ``Y = N·q − Σq`` and ``V = N·Σq² − (Σq)²``, which is N² times the
    variance, the normalized value is Y/√V: neither the mean nor the variance is rounded, and the
    zero point cancels. ``(f, e) = inverse_root(V)``, and the result is
    ``round_half_even(Y · f / 2^(e−20))``. It differs from ``2^20 · Y/√V`` by at most
    ``½ + 2^-20.9 · |2^20 · Y/√V|`` and is at most ``2^20 · √N`` plus 1. ``bias`` is int64 of the
    normalized shape. Raises CompileError where N times the largest code difference reaches 2^31.
    """
    check_codes("layer_norm_integer", x)
    info = torch.iinfo(x.dtype)
    size = _checked_size("layer_norm_integer", x, bias, dims, info.max - info.min)
    return _over_rows(x, bias, size, lambda values: _normalize(values, size))


def layer_norm_power_of_two(
    x: Tensor, x_zero_point: int, channel_shift: Tensor, bias: Tensor | None, dims: int
) -> Tensor:
    """FQ-ViT's layer norm: `layer_norm_integer` of 8-bit codes with a power of two per channel.

    ``q8 = clamp(round_half_even((q − z) / 2^s_c), −128, 127)`` and ``y = q8 · 2^s_c`` is what is
    normalized. ``channel_shift`` is int64 [C] along the last dimension, 0 to 15. Source: Lin et
    al., IJCAI 2022.
    """
    check_codes("layer_norm_power_of_two", x)
    # Rounding to a multiple of 2^s at most doubles a value, and two of them may differ in sign.
    difference = 4 * largest_operand(x.dtype, x_zero_point)
    size = _checked_size("layer_norm_power_of_two", x, bias, dims, difference)
    low, high = (int(value) for value in channel_shift.aminmax())
    if low < 0 or high > 15 or channel_shift.shape != x.shape[-1:]:
        raise CompileError(
            f"fxquant.layer_norm_power_of_two: needs a shift of 0..15 for each of "
            f"{x.shape[-1]} channels, not {list(channel_shift.shape)} of {low}..{high}"
        )
    powers = torch.ones_like(channel_shift) << channel_shift
    factor = powers.to(torch.float64).repeat(size // x.shape[-1])

    def normalize(values: Tensor) -> Tensor:
        # Powers of two: exact.
        q8 = values.sub_(x_zero_point).div_(factor).round_().clamp_(-128, 127)
        return _normalize(q8.mul_(factor), size)

    return _over_rows(x, bias, size, normalize)


def _normalize(values: Tensor, size: int) -> Tensor:
    """``round_half_even(2^20 · Y/√V)`` of rows of integers in float64; overwrites them."""
    total = values.sum(-1, keepdim=True)
    squares = (values * values).sum(-1, keepdim=True).to(torch.int64)
    variance = size * squares - total.to(torch.int64) ** 2
    factor, exponent = inverse_root(variance)
    # |Y| < 2^31 and f ≤ 2^22: every product is below 2^53, and the powers of two are exact.
    scaled = factor / (torch.ones_like(exponent) << (exponent - _OUTPUT_BITS)).to(torch.float64)
    return values.mul_(size).sub_(total).mul_(scaled).round_()


def _checked_size(operator: str, x: Tensor, bias: Tensor | None, dims: int, difference: int) -> int:
    """How many values are normalized together; raises CompileError where they may overflow.

    ``difference`` bounds what two values can differ by.
    """
    shape = x.shape[x.dim() - dims :]
    if not 1 <= dims <= x.dim() or (bias is not None and bias.shape != shape):
        found = None if bias is None else list(bias.shape)
        raise CompileError(
            f"fxquant.{operator}: a bias of shape {found} and the last {dims} dimensions of "
            f"{list(x.shape)} do not match"
        )
    size = shape.numel()
    if size * difference >= 2 ** (53 - FACTOR_BITS):
        raise CompileError(
            f"fxquant.{operator}: rows of {size} values of {x.dtype} are too long; the limit is "
            f"{(2 ** (53 - FACTOR_BITS) - 1) // difference}"
        )
    return size


def _over_rows(
    x: Tensor, bias: Tensor | None, size: int, normalize: Callable[[Tensor], Tensor]
) -> Tensor:
    """``normalize`` of the rows in float64, as int64, plus the bias."""
    if not x.numel():
        return x.to(torch.int64)
    summand = None if bias is None else bias.reshape(-1)

    def compute(rows: Tensor, _: Tensor | None) -> Tensor:
        integers = normalize(rows.to(torch.float64)).to(torch.int64)
        return integers if summand is None else integers.add_(summand)

    result = in_chunks(x.reshape(-1, size), None, torch.contiguous_format, WIDE * size, compute)
    return result.reshape(x.shape)
