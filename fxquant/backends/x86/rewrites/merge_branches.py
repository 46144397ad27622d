"""Branches that read channels of one value and end in one concatenation become one chain."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.x86.rewrites.branch import Branch, find_branch
from fxquant.backends.x86.rewrites.convolution import Convolution, clamp_range
from fxquant.integer.rounding import channel_factors
from fxquant.to_integer import Grid
from passes import Decline, Pass, PassResult, Rewriter, tensor_info

__all__ = ["MergeBranches"]


class MergeBranches(Pass):
    """Convolutions that stand beside each other run as one, and so do values passed on as is.

        p, b = chunk(x)                      a = conv(x, [I 0; 0 w1])
        a = conv(b, w1)                      d = depthwise(a, [1; wd])
        d = depthwise(a, wd)          =>     return conv(d, shuffled rows of [I 0; 0 w2])
        y = conv(d, w2)
        return shuffle(cat(p, y))

    Every layer of the chain is block-diagonal. A channel that passes by has the weight code 1 at
    a multiplier of 1, so that its accumulator is its code; biases, which count in the same
    steps, shift codes to where the layer's clamp leaves them alone. The other channels keep
    their accumulators and, by weight scales in float64, their multipliers to the last bit. So
    the integers of the result are those of the concatenation.

    Declines where the branches do not line up, where their values cannot lie in one tensor, and
    where the products with zeros cost more than the calls that they save: above `most_channels`
    channels, or `most_products` products with zeros for one sample.
    """

    def __init__(self, most_channels: int, most_products: int) -> None:
        self.most_channels = most_channels
        self.most_products = most_products

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Merge at every concatenation where that is exact and pays."""
        rewriter = Rewriter(graph_module)
        declines = []
        for node in list(rewriter.graph.nodes):
            operands: Any = node.args[0] if node.target is torch.cat else ()
            if not isinstance(operands, (list, tuple)) or "grid" not in node.meta:
                continue
            branches = [find_branch(operand) for operand in operands]
            if not any(branch.convolutions for branch in branches):
                continue
            try:
                chain = _Chain(node, branches)
                self._check_cost(chain)
            except _RefusalError as refusal:
                declines.append(Decline.at(node, str(refusal)))
            else:
                chain.write(rewriter)
        return PassResult(rewriter.finish(), tuple(declines))

    def _check_cost(self, chain: _Chain) -> None:
        channels, products = max(layer.channels for layer in chain.layers), chain.added_products()
        _require(
            channels <= self.most_channels and products <= self.most_products,
            f"{channels} channels would multiply {products} zeros",
        )


class _RefusalError(Exception):
    """Why branches stay apart."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _RefusalError(reason)


@dataclass(frozen=True)
class _Part:
    """A branch's channels inside the merged value: code there = code in the branch + `shift`."""

    channels: Sequence[int]
    zero_point: int
    low: int
    high: int
    shift: int = 0


class _Chain:
    """The layers that stand for all branches of one concatenation."""

    def __init__(self, node: fx.Node, branches: Sequence[Branch]) -> None:
        self.node = node
        self.branches = branches
        self.source = branches[0].source
        self.grid: Grid = node.meta["grid"]
        self.longest = max(branches, key=lambda branch: len(branch.convolutions))
        self._check_form()
        grid: Grid = self.source.meta["grid"]
        low, high = clamp_range(self.source)
        self.scale, self.zero_point = grid.scale, grid.zero_point
        info = tensor_info(self.source)
        assert info is not None
        self.width = int(info.shape[1])
        self.parts = [_Part(b.channels, grid.zero_point, low, high) for b in branches]
        self.layers = [self._layer(index) for index in range(len(self.longest.convolutions))]
        self._check_end()
        self._shuffle_rows()

    def _check_form(self) -> None:
        info = tensor_info(self.node)
        dim = self.node.args[1] if len(self.node.args) > 1 else self.node.kwargs.get("dim", 0)
        rank = self.longest.convolutions[0].weight.dim()
        source: Grid | None = self.source.meta.get("grid")
        _require(source is not None and source.dtype == torch.uint8, "reads no 8-bit codes")
        _require(all(b.source is self.source for b in self.branches), "reads several values")
        _require(info is not None and len(info.shape) == rank, "joins no channels")
        _require(isinstance(dim, int) and dim == 1, "joins no channels")
        _require(len(self.longest.convolutions) > 1, "single layers gain nothing")
        _require(not self.longest.convolutions[0].depthwise, "starts with a depthwise layer")

    # -- one layer -----------------------------------------------------------------------

    def _layer(self, index: int) -> Convolution:
        main = self.longest.convolutions[index]
        behind = index - len(self.longest.convolutions)
        own = [
            branch.convolutions[behind] if len(branch.convolutions) >= -behind else None
            for branch in self.branches
        ]
        last = behind == -1
        outputs: list[_Part] = []
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for part, convolution in zip(self.parts, own, strict=True):
            start = sum(len(output.channels) for output in outputs)
            if convolution is None:
                output = self._passed_on(part, main, start, last)
                rows.append(self._identity(part, output, main))
            else:
                output = self._computed(convolution, main, start)
                rows.append(self._rows(part, convolution, main))
            outputs.append(output)
        weights, scales, biases = (torch.cat(column) for column in zip(*rows, strict=True))
        layer = replace(
            main,
            x=self.source,
            x_scale=self.scale,
            x_zero_point=self.zero_point,
            weight=weights,
            weight_scale=scales,
            bias=biases.to(torch.int32),
            groups=weights.shape[0] if main.depthwise else 1,
        )
        refusal = layer.refusal()
        _require(refusal is None, refusal or "")
        self.parts = outputs
        self.scale, self.zero_point, self.width = main.scale, main.zero_point, layer.channels
        return layer

    def _passed_on(self, part: _Part, main: Convolution, start: int, last: bool) -> _Part:
        """Where a layer leaves a value that it does not compute with."""
        padding = tuple(
            d * (k - 1) / 2 for d, k in zip(main.dilation, main.kernel_size, strict=True)
        )
        keeps_size = set(main.stride) == {1} and padding == main.padding
        _require(keeps_size, "passes a value by a layer that changes its size")
        low, high = main.qmin - part.low, main.qmax - part.high
        _require(low <= high, "a layer's clamp is too narrow for a value that passes by")
        # With equal distances to the zero points, padding means the same value.
        natural = 0 if last else main.zero_point - part.zero_point
        shift = min(max(natural, low), high)
        channels = range(start, start + len(part.channels))
        return replace(part, channels=channels, shift=shift)

    def _computed(self, convolution: Convolution, main: Convolution, start: int) -> _Part:
        _require(convolution.geometry == main.geometry, "has branches of different layers")
        same = convolution.zero_point == main.zero_point
        _require(same, "has branches with different zero points")
        bounds = convolution.qmin, convolution.qmax
        _require(bounds == (main.qmin, main.qmax), "has branches with different clamps")
        channels = range(start, start + convolution.channels)
        return _Part(channels, convolution.zero_point, *bounds)

    def _identity(
        self, part: _Part, output: _Part, main: Convolution
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(part.channels)
        weight = self._zeros(count, main)
        columns = torch.zeros(count) if main.depthwise else torch.tensor(list(part.channels))
        weight[torch.arange(count), columns.long()] = self._tap(main)
        scales = torch.full((count,), main.scale / self.scale, dtype=torch.float64)
        assert torch.equal(channel_factors(self.scale, scales, main.scale), torch.ones(count))
        bias = output.shift - part.shift + self.zero_point - main.zero_point
        return weight, scales, torch.full((count,), bias, dtype=torch.int64)

    def _rows(
        self, part: _Part, convolution: Convolution, main: Convolution
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = convolution.weight
        if not main.depthwise:
            weight = self._zeros(convolution.channels, main)
            weight[:, list(part.channels)] = convolution.weight
        factors = channel_factors(convolution.x_scale, convolution.scales, convolution.scale)
        scales = convolution.scales
        if (self.scale, main.scale) != (convolution.x_scale, convolution.scale):
            scales = factors.double() * main.scale / self.scale
        kept = torch.equal(channel_factors(self.scale, scales, main.scale), factors)
        _require(kept, "a multiplier cannot be kept")
        moved = part.shift + part.zero_point - self.zero_point
        _require(moved == 0 or not any(main.padding), "padding would change its value")
        bias = torch.zeros(convolution.channels, dtype=torch.int64)
        if convolution.bias is not None:
            bias = convolution.bias.to(torch.int64)
        return weight, scales, bias - moved * convolution.weight.long().flatten(1).sum(1)

    def _zeros(self, count: int, main: Convolution) -> Tensor:
        inputs = 1 if main.depthwise else self.width
        return torch.zeros((count, inputs, *main.kernel_size), dtype=torch.int8)

    @staticmethod
    def _tap(main: Convolution) -> Tensor:
        """1 at the window's centre."""
        tap = torch.zeros(main.kernel_size, dtype=torch.int8)
        tap.flatten()[tap.numel() // 2] = 1
        return tap

    # -- the end -------------------------------------------------------------------------

    def _check_end(self) -> None:
        layer = self.layers[-1]
        lies_on = (layer.scale, layer.zero_point) == self.grid.input
        source: Grid = self.source.meta["grid"]
        passed = any(not branch.convolutions for branch in self.branches)
        _require(lies_on and (not passed or source.input == self.grid.input), "joins other scales")
        ends = [branch.convolutions[-1] for branch in self.branches if branch.convolutions]
        _require(
            all((e.scale, e.zero_point) == self.grid.input for e in ends), "joins other scales"
        )
        _require(all(part.shift == 0 for part in self.parts), "the last clamp cuts a passed value")

    def _shuffle_rows(self) -> None:
        """The only reader, where it is a shuffle, is an order of the last layer's rows."""
        users = list(self.node.users)
        if len(users) != 1 or users[0].target is not torch.channel_shuffle:
            return
        self.node = users[0]
        groups = operator.index(self.node.kwargs["groups"])  # type: ignore[arg-type]
        layer = self.layers[-1]
        order = torch.arange(layer.channels).reshape(groups, -1).t().flatten()
        assert layer.bias is not None
        self.layers[-1] = replace(
            layer,
            weight=layer.weight[order],
            weight_scale=layer.weight_scale[order],
            bias=layer.bias[order],
        )

    def added_products(self) -> int:
        """With zeros, for one sample."""
        added = 0
        for index, (layer, node) in enumerate(zip(self.layers, self.longest.nodes, strict=True)):
            behind = index - len(self.layers)
            convolutions = [b.convolutions[behind:][:1] for b in self.branches]
            own = sum(c.weight.numel() for found in convolutions for c in found)
            info = tensor_info(node)
            positions = math.prod(info.shape[2:]) if info is not None else 1
            added += (layer.weight.numel() - own) * positions
        return added

    def write(self, rewriter: Rewriter) -> None:
        value = self.source
        for layer, like in zip(self.layers[:-1], self.longest.nodes[:-1], strict=True):
            grid: Grid = like.meta["grid"]
            layer = replace(layer, x=value)
            value = layer.write(rewriter, self.node, like, grid, f"{like.name}_merged")
        last = replace(self.layers[-1], x=value)
        last.write(rewriter, self.node, self.longest.nodes[-1], self.grid)
