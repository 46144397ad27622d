"""Small integer graphs with random weights and grids, and what a rewrite must not change."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxquant.kernels  # noqa: F401  (registers torch.ops.fxquant)
from fxquant.to_integer import Grid
from passes import Pass, PassResult, copy_sharing_tensors
from passes.infra.verify import run_and_annotate

OPS: Any = torch.ops.fxquant
ONE_SIDED = Grid(0.02, 0, 0, 255, torch.uint8)
AFFINE = Grid(0.03, 117, 0, 255, torch.uint8)
# Of single channels an identity is hard to tell from a constant.
CHANNELS = 6


class IntegerGraph:
    """Writes an integer graph node by node; values are nodes with their grid."""

    def __init__(self, seed: int, grid: Grid = ONE_SIDED, channels: int = CHANNELS) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.input = self.graph.placeholder("input")
        self.example = torch.randn(2, channels, 5, 5, generator=self.generator) * 2
        self.count = 0
        self.x = self.call(
            OPS.quantize.default,
            grid,
            self.input,
            grid.scale,
            grid.zero_point,
            grid.zero_point,
            255,
            torch.uint8,
        )

    def call(self, target: Any, grid: Grid, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["grid"] = grid
        return node

    def conv(
        self,
        x: fx.Node,
        grid: Grid,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        relu: bool = False,
        per_tensor: bool = False,
        bias: bool = True,
        residual: fx.Node | None = None,
    ) -> fx.Node:
        source: Grid = x.meta["grid"]
        weight = self.integers(-127, 128, outputs, inputs // groups, kernel, kernel)
        scales = 1 if per_tensor else outputs
        # A sum of n products of codes is about 5000 · sqrt(n).
        reach = 5e3 * (inputs // groups * kernel**2) ** 0.5 / 60
        scale = (
            grid.scale / source.scale / reach * (0.5 + torch.rand(scales, generator=self.generator))
        )
        biases = self.integers(-9000, 9000, outputs).to(torch.int32)
        args = (
            x,
            *source.input,
            self.constant(weight.to(torch.int8)),
            self.constant(scale.float()),
            None,
            self.constant(biases) if bias else None,
            [stride] * 2,
            [kernel // 2] * 2,
            [1, 1],
            groups,
            *grid.output(grid.zero_point if relu else None),
        )
        if residual is not None:
            extra: Grid = residual.meta["grid"]
            args = (*args, residual, *extra.input)
        return self.call(OPS.conv.default, grid, *args)

    def depthwise(
        self, x: fx.Node, grid: Grid, channels: int, *, stride: int = 1, relu: bool = False
    ) -> fx.Node:
        return self.conv(
            x, grid, channels, channels, kernel=3, stride=stride, groups=channels, relu=relu
        )

    def halves(self, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        grid: Grid = x.meta["grid"]
        parts = self.call(torch.chunk, grid, x, chunks=2, dim=1)
        return self.call(operator.getitem, grid, parts, 0), self.call(
            operator.getitem, grid, parts, 1
        )

    def cat(self, *values: fx.Node) -> fx.Node:
        return self.call(torch.cat, values[0].meta["grid"], list(values), dim=1)

    def shuffle(self, x: fx.Node, groups: int = 2) -> fx.Node:
        return self.call(torch.channel_shuffle, x.meta["grid"], x, groups=groups)

    def max_pool(self, x: fx.Node) -> fx.Node:
        window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
        return self.call(OPS.max_pool.default, x.meta["grid"], x, *window)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def constant(self, value: Tensor) -> fx.Node:
        name = f"constant_{self.count}"
        self.count += 1
        self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def finish(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        module = fx.GraphModule(self.root, self.graph)
        run_and_annotate(module, (self.example,), name="example")
        return module


def rewritten(
    step: Pass, graph: IntegerGraph, *outputs: fx.Node, modified: bool | None = True
) -> tuple[fx.GraphModule, PassResult]:
    """The graph after `step`, checked: equal integers, in whatever value kept its name.

    `modified` is what the step is expected to say, None for either.
    """
    before = graph.finish(*outputs)
    after = copy_sharing_tensors(before)
    result = step.run(after)
    assert modified in (result.modified, None)
    assert not step.run(after).modified
    expected, found = _values(before, graph.example), _values(after, graph.example)
    for name, value in found.items():
        if name in expected and name not in _widened(after, before):
            assert torch.equal(expected[name], value), name
    for want, got in zip(before(graph.example), after(graph.example), strict=True):
        assert torch.equal(want, got)
        assert len(want.unique()) > 20, "the example says nothing: nearly all codes are clamped"
    run_and_annotate(before, (graph.example,), name="before")
    annotated = {node.name: node.meta.get("tensor") for node in after.graph.nodes}
    run_and_annotate(after, (graph.example,), name="after")
    for node in after.graph.nodes:
        if "grid" in node.meta:
            assert annotated[node.name] == node.meta["tensor"], node.name
    return after, result


def _widened(after: fx.GraphModule, before: fx.GraphModule) -> set[str]:
    shapes = {node.name: node.meta.get("tensor") for node in before.graph.nodes}
    return {
        node.name
        for node in after.graph.nodes
        if node.name in shapes and node.meta.get("tensor") != shapes[node.name]
    }


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if "grid" in n.meta and isinstance(result, Tensor):
            self.values[n.name] = result
        return result


def _values(graph_module: fx.GraphModule, example: Tensor) -> dict[str, Tensor]:
    recorder = _Recorder(graph_module)
    recorder.run(example)
    return recorder.values


def operations(graph_module: fx.GraphModule) -> Counter[str]:
    return Counter(
        str(getattr(node.target, "__name__", node.target)).split(".")[0]
        for node in graph_module.graph.nodes
        if "grid" in node.meta
    )
