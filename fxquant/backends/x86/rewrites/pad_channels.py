"""Pooling kernels want whole vectors of channels: zero channels fill them up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.backends.x86.rewrites.convolution import Convolution
from fxquant.to_integer import Grid
from passes import Decline, Pass, PassResult, Rewriter, TensorInfo, tensor_info

__all__ = ["PadChannels"]

_POOLS: dict[Any, int] = {
    torch.ops.fxquant.max_pool.default: 32,
    torch.ops.fxquant.avg_pool.default: 16,
}


class PadChannels(Pass):
    """A pooled convolution gets zero rows up to a whole number of vectors.

        c = conv(x, w)                c = conv(x, [w; 0])
        p = max_pool(c)        =>     p = max_pool(c)
        return conv(p, v)             return conv(p, [v 0])

    Torch's pooling kernels fall back to single values for what is left of the channels after
    their vectors of 32 (maximum) or 16 (average), ten times as slow. What the added channels hold
    meets weights of zero in the convolutions that read them; depthwise layers on the way get zero
    channels too. Declines where anything else reads the added channels.
    """

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Pad at every 2d pool of a convolution that allows it."""
        rewriter = Rewriter(graph_module)
        declines = []
        for node in list(rewriter.graph.nodes):
            if node.target not in _POOLS or "grid" not in node.meta:
                continue
            reason = self._pad(node, rewriter)
            if reason is not None:
                declines.append(Decline.at(node, reason))
        return PassResult(rewriter.finish(), tuple(declines))

    def _pad(self, pool: fx.Node, rewriter: Rewriter) -> str | None:
        source, info = pool.all_input_nodes[0], tensor_info(pool)
        if info is None or len(info.shape) != 4:
            return None
        count = -info.shape[1] % _POOLS[pool.target]
        if count == 0:
            return None
        convolution = Convolution.read(source)
        if convolution is None or convolution.groups > 1 or not _is_plain(convolution):
            return f"{source.name} is no convolution of all channels that could be padded"
        readers = list(_readers(source))
        for user in readers:
            if not _can_pad(user):
                return f"{user.name} reads the channels, and is no convolution"
        _write(_with_rows(convolution, count), source, rewriter)
        for user in readers:
            reading = Convolution.read(user)
            if reading is None:
                _widen(user, count)
            elif reading.depthwise:
                padded = _with_rows(reading, count)
                _write(replace(padded, groups=padded.channels), user, rewriter)
            else:
                weight = _padded(reading.weight, 1, count)
                _write(replace(reading, weight=weight), user, rewriter)
        return None


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    """What reads the channels of `value`, through pools and depthwise layers, in that order."""
    for user in value.users:
        yield user
        reading = Convolution.read(user)
        if user.target in _POOLS or (reading is not None and reading.depthwise):
            yield from _readers(user)


def _can_pad(user: fx.Node) -> bool:
    reading = Convolution.read(user)
    if reading is None:
        return user.target in _POOLS and "grid" in user.meta
    return _is_plain(reading) and (reading.groups == 1 or reading.depthwise)


def _is_plain(convolution: Convolution) -> bool:
    return convolution.residual is None and convolution.weight_zero_point is None


def _with_rows(convolution: Convolution, count: int) -> Convolution:
    bias = convolution.bias
    return replace(
        convolution,
        weight=_padded(convolution.weight, 0, count),
        weight_scale=torch.cat([convolution.scales, torch.ones(count, dtype=torch.float64)]),
        bias=None if bias is None else _padded(bias, 0, count),
    )


def _padded(tensor: Tensor, dimension: int, count: int) -> Tensor:
    sides = [0, 0] * (tensor.dim() - dimension - 1) + [0, count]
    return F.pad(tensor, sides)


def _write(convolution: Convolution, node: fx.Node, rewriter: Rewriter) -> None:
    grid: Grid = node.meta["grid"]
    convolution.write(rewriter, node, node, grid)


def _widen(node: fx.Node, count: int) -> None:
    info = tensor_info(node)
    assert info is not None
    shape = (info.shape[0], info.shape[1] + count, *info.shape[2:])
    node.meta["tensor"] = TensorInfo(shape, info.dtype)
