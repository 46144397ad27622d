"""Integer graphs of transformer pieces, with random weights and grids."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.backends import check_operations
from fxquant.backends.x86.target import X86
from fxquant.to_integer import Grid
from passes.infra.verify import run_and_annotate
from tests.fxquant.backends.integer_graphs import OPS, IntegerGraph

TOKENS = Grid(0.03, 117, 0, 255, torch.uint8)
PROBABILITIES = Grid(1 / 255, 0, 0, 255, torch.uint8)
FLOAT = (1.0, 0, 0, 0, torch.float32)


class TokenGraph(IntegerGraph):
    """Writes an integer graph on [batch, tokens, channels]."""

    def __init__(self, seed: int, tokens: int, channels: int, grid: Grid = TOKENS) -> None:
        super().__init__(seed, grid)
        self.channels = channels
        self.example = torch.randn(2, tokens, channels, generator=self.generator)

    def linear(
        self,
        x: fx.Node,
        grid: Grid | None,
        inputs: int,
        outputs: int,
        *,
        low: int | None = None,
        high: int | None = None,
        per_tensor: bool = False,
        zero_points: bool = False,
        bias: bool = True,
    ) -> fx.Node:
        """A linear layer onto `grid`, or to floats of about unit size."""
        source: Grid = x.meta["grid"]
        scales = 1 if per_tensor else outputs
        step = (1.0 if grid is None else 60 * grid.scale) / source.scale / (5e3 * inputs**0.5)
        arguments = (
            x,
            *source.input,
            self.constant(self.integers(-127, 128, outputs, inputs).to(torch.int8)),
            self.constant((step * (0.5 + torch.rand(scales, generator=self.generator))).float()),
            self.constant(self.integers(-9, 9, scales).to(torch.int32)) if zero_points else None,
            self.constant(self.integers(-9000, 9000, outputs).to(torch.int32)) if bias else None,
        )
        if grid is None:
            return self.graph.call_function(OPS.linear.default, (*arguments, *FLOAT))
        return self.call(OPS.linear.default, grid, *arguments, *grid.output(low, high))

    def quantize(self, x: fx.Node, grid: Grid, low: int | None = None) -> fx.Node:
        return self.call(OPS.quantize.default, grid, x, *grid.output(low))

    def dequantize(self, x: fx.Node) -> fx.Node:
        return self.function(OPS.dequantize.default, x, *x.meta["grid"].input)

    def matmul(self, a: fx.Node, b: fx.Node, grid: Grid | None, alpha: float = 1.0) -> fx.Node:
        operands = (a, *a.meta["grid"].input, b, *b.meta["grid"].input, alpha)
        if grid is None:
            return self.function(OPS.matmul.default, *operands, *FLOAT)
        return self.call(OPS.matmul.default, grid, *operands, *grid.output())

    def function(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call that yields floats."""
        return self.graph.call_function(target, args, kwargs)

    def attention(self, x: fx.Node, heads: int, *, bias: bool = False) -> fx.Node:
        """Attention of integers: one projection for all three, scores and softmax in float."""
        width = self.channels // heads
        qkv = self.linear(x, TOKENS, self.channels, 3 * self.channels)
        tokens = self.example.shape[1]
        split = self.call(torch.reshape, TOKENS, qkv, shape=(-1, tokens, 3, heads, width))
        moved = self.call(torch.permute, TOKENS, split, dims=(2, 0, 3, 1, 4))
        q, k, v = (self.call(operator.getitem, TOKENS, moved, index) for index in range(3))
        k = self.call(torch.transpose, TOKENS, k, dim0=-2, dim1=-1)
        scores = self.matmul(q, k, None, 30 / (60**2 * TOKENS.scale**2) / width**0.5)
        if bias:
            scores = self.function(torch.add, scores, self.constant(torch.randn(heads, 1, 1)))
        probabilities = self.quantize(self.function(F.softmax, scores, dim=-1), PROBABILITIES)
        y = self.matmul(probabilities, v, TOKENS, 2.0)
        y = self.call(torch.transpose, TOKENS, y, dim0=1, dim1=2)
        return self.call(torch.reshape, TOKENS, y, shape=(-1, tokens, self.channels))

    def block(self, x: fx.Node, heads: int, hidden: int) -> fx.Node:
        """A pre-norm block on floats [batch, tokens, channels], residual stream in float."""
        channels = self.channels
        y = self.quantize(self.norm(x), TOKENS)
        x = self.function(
            torch.add, x, self.linear(self.attention(y, heads), None, channels, channels)
        )
        y = self.linear(self.quantize(self.norm(x), TOKENS), None, channels, hidden)
        y = self.quantize(self.function(F.gelu, y, approximate="none"), TOKENS)
        return self.function(torch.add, x, self.linear(y, None, hidden, channels))

    def norm(self, x: fx.Node) -> fx.Node:
        return self.function(F.layer_norm, x, normalized_shape=(self.channels,))


def lowered(
    graph: TokenGraph, *outputs: fx.Node, largest: int = 1
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The integer graph and its x86 graph, every operation compared on the example."""
    integer = graph.finish(*outputs)
    x86 = X86().lower(integer, (graph.example,)).graph_module
    run_and_annotate(x86, (graph.example,), name="x86 graph")
    check = check_operations(integer, x86, (graph.example,))
    assert check.operations
    assert check.largest <= largest
    compared = {entry.node for entry in check.operations}
    named = {n.meta["integer"] for n in x86.graph.nodes if "integer" in n.meta}
    assert compared <= named
    return integer, x86


def kernels(graph: fx.GraphModule) -> Counter[str]:
    """How often each kernel is called."""
    return Counter(
        str(getattr(node.target, "__name__", node.target))
        for node in graph.graph.nodes
        if node.op.startswith("call")
    )
