"""The operators once more, in plain numpy: int64 loops, and float32 products one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any


def multiplier(x_scale: float, weight_scale: Tensor, scale: float) -> Array:
    wide = np.float64(x_scale) * weight_scale.numpy().astype(np.float64) / np.float64(scale)
    return wide.astype(np.float32)


def codes(real: Array, zero_point: int, qmin: int, qmax: int) -> Array:
    assert real.dtype == np.float32
    return np.clip(np.rint(real).astype(np.int64) + zero_point, qmin, qmax)


def rescaled(
    sums: Array, factors: Array, zero_point: int, qmin: int, qmax: int, extra: Array | None = None
) -> Array:
    """Codes of sums [N, O, ...] with one factor for each channel."""
    shape = (1, -1, *[1] * (sums.ndim - 2))
    real = sums.astype(np.float32) * factors.reshape(shape)
    return codes(real if extra is None else real + extra, zero_point, qmin, qmax)


def conv_sums(
    x: Tensor,
    x_zero_point: int,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    w = weight.numpy().astype(np.int64)
    spatial = w.ndim - 2
    if weight_zero_point is not None:
        w = w - weight_zero_point.numpy().astype(np.int64).reshape(-1, 1, *[1] * spatial)
    # Pads with the zero point itself, as the contract is written.
    widths = [(0, 0), (0, 0), *((pad, pad) for pad in padding)]
    wide = np.pad(x.numpy().astype(np.int64), widths, constant_values=x_zero_point) - x_zero_point
    extents = [
        (wide.shape[2 + d] - dilation[d] * (w.shape[2 + d] - 1) - 1) // stride[d] + 1
        for d in range(spatial)
    ]
    out = np.zeros((wide.shape[0], w.shape[0], *extents), np.int64)
    ins, outs = w.shape[1], w.shape[0] // groups
    for n, o in itertools.product(range(out.shape[0]), range(w.shape[0])):
        first = (o // outs) * ins
        for position in itertools.product(*map(range, extents)):
            window = tuple(
                slice(p * s, p * s + d * (k - 1) + 1, d)
                for p, s, d, k in zip(position, stride, dilation, w.shape[2:], strict=True)
            )
            taken = wide[(n, slice(first, first + ins), *window)]
            out[(n, o, *position)] = (taken * w[o]).sum()
            if bias is not None:
                out[(n, o, *position)] += int(bias[o])
    return out


def conv_transpose_sums(
    x: Tensor,
    x_zero_point: int,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
) -> Array:
    w = weight.numpy().astype(np.int64)
    q = x.numpy().astype(np.int64) - x_zero_point
    spatial, ins, outs = w.ndim - 2, w.shape[0] // groups, w.shape[1]
    full = [
        (q.shape[2 + d] - 1) * stride[d]
        + dilation[d] * (w.shape[2 + d] - 1)
        + 1
        + output_padding[d]
        for d in range(spatial)
    ]
    out = np.zeros((q.shape[0], outs * groups, *full), np.int64)
    for n, i, j in itertools.product(range(q.shape[0]), range(w.shape[0]), range(outs)):
        o = (i // ins) * outs + j
        zero = 0
        if weight_zero_point is not None:
            zero = int(weight_zero_point[o if weight_zero_point.numel() > 1 else 0])
        for position in itertools.product(*map(range, q.shape[2:])):
            for tap in itertools.product(*map(range, w.shape[2:])):
                at = tuple(
                    p * s + t * d
                    for p, s, t, d in zip(position, stride, tap, dilation, strict=True)
                )
                out[(n, o, *at)] += q[(n, i, *position)] * (w[(i, j, *tap)] - zero)
    cropped = tuple(slice(pad, size - pad) for pad, size in zip(padding, full, strict=True))
    out = out[(slice(None), slice(None), *cropped)]
    if bias is not None:
        out = out + bias.numpy().astype(np.int64).reshape(1, -1, *[1] * spatial)
    return out


def uint8(shape: Sequence[int]) -> Tensor:
    return torch.randint(0, 256, tuple(shape), dtype=torch.uint8)


def int8(shape: Sequence[int]) -> Tensor:
    return torch.randint(-128, 128, tuple(shape), dtype=torch.int8)


def scales(channels: int) -> Tensor:
    return torch.rand(channels) * 0.01 + 0.001


def same(found: Tensor, expected: Array) -> bool:
    return torch.equal(found.to(torch.int64), torch.from_numpy(np.array(expected)))
