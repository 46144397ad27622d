"""Weights in the order in which the kernels read them (`kernels/params.h` defines it)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 64
"""Output channels that a kernel computes together."""
BLOCK = 32
"""Channels of a depthwise layer that are packed together."""
QUAD = 4
"""Products that one multiply instruction adds up."""


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def pack_conv(weight: Tensor, groups: int = 1, row_pixel: int | None = None) -> Tensor:
    """``weight`` int8 [O, I/groups, kh, kw] as [groups, panels, quads, 64, 4], zero where padded.

    With ``row_pixel``, the image's bytes from pixel to pixel and a multiple of 4, a kernel row is
    one run of ``kw · row_pixel`` bytes: segments are kernel rows. Without, every tap is a segment
    of the channels, padded to 4. A linear layer is [O, K, 1, 1].
    """
    outputs, channels, height, width = weight.shape
    step = _up(channels, QUAD) if row_pixel is None else row_pixel
    taps = F.pad(weight.permute(0, 2, 3, 1), (0, step - channels))
    columns = taps.reshape(groups, outputs // groups, height * width * step)
    return _panels(columns)


def _panels(columns: Tensor) -> Tensor:
    """[groups, O, K] as [groups, O/64, K/4, 64, 4]."""
    groups, outputs, depth = columns.shape
    padded = F.pad(columns, (0, 0, 0, _up(outputs, PANEL) - outputs))
    tiles = padded.reshape(groups, -1, PANEL, depth // QUAD, QUAD)
    return tiles.transpose(2, 3).contiguous()


def pad_outputs(values: Tensor, groups: int = 1) -> Tensor:
    """A bias or multiplier [O] as [groups, panels · 64], zero where padded."""
    rows = values.reshape(groups, -1)
    return F.pad(rows, (0, _up(rows.shape[1], PANEL) - rows.shape[1])).contiguous()


def depthwise_lanes(channels: int) -> Tensor:
    """The packed position of each channel of a depthwise layer: int64 [channels]."""
    channel = torch.arange(channels)
    inside = channel % BLOCK
    return channel - inside + inside // 4 % 2 * 16 + inside // 8 * 4 + inside % 4


def pack_depthwise(weight: Tensor) -> Tensor:
    """``weight`` int8 [C, 1, kh, kw] as [blocks, kw, ⌈kh/4⌉, 2, 16, 4], zero where padded."""
    channels, _, height, width = weight.shape
    ordered = weight.new_zeros(_up(channels, BLOCK), _up(height, QUAD), width)
    ordered[depthwise_lanes(channels), :height] = weight[:, 0]
    blocks = ordered.reshape(-1, 2, 16, _up(height, QUAD) // QUAD, QUAD, width)
    return blocks.permute(0, 5, 3, 1, 2, 4).contiguous()


def pack_lanes(values: Tensor) -> Tensor:
    """A bias or multiplier [C] of a depthwise layer in the order of its lanes."""
    packed = values.new_zeros(_up(values.numel(), BLOCK))
    packed[depthwise_lanes(values.numel())] = values
    return packed
