"""Every exact pass keeps the outputs of graphs that nobody thought of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from passes import FoldBatchNorm, FuseConvBnRelu, InferRanges, InsideBlocks, Pass, Pipeline
from passes.infra import listing
from tests.passes.models import batch_norm

_SIZE = 6
_UNARY: tuple[Callable[..., Any], ...] = (
    F.relu,
    F.relu6,
    torch.sigmoid,
    torch.tanh,
    F.hardswish,
    F.silu,
)


class Builder:
    """Draws one graph of images [N, C, 6, 6], operation by operation."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values = [(self.graph.placeholder("x"), 4)]
        self.layers: list[tuple[str, int, int]] = []

    def pick(self) -> tuple[fx.Node, int]:
        """One of the latest values, so that graphs get deep."""
        return self.draw(st.sampled_from(self.values[-4:]))

    def module(self, module: nn.Module, node: fx.Node) -> fx.Node:
        name = f"m{len(list(self.root.children()))}"
        self.root.add_module(name, module.eval())
        return self.graph.call_module(name, (node,))

    def convolution(self) -> tuple[fx.Node, int]:
        node, channels = self.pick()
        groups = self.draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
        outer = groups * self.draw(st.integers(1, max(1, 6 // groups)))
        bias = self.draw(st.booleans())
        kind = self.draw(st.sampled_from(["pointwise", "same", "reflect", "transposed"]))
        options = {"groups": groups, "bias": bias}
        layers = {
            "pointwise": lambda: nn.Conv2d(channels, outer, 1, **options),
            "same": lambda: nn.Conv2d(channels, outer, 3, padding="same", **options),
            "reflect": lambda: nn.Conv2d(
                channels, outer, 3, padding=1, padding_mode="reflect", **options
            ),
            "transposed": lambda: nn.ConvTranspose2d(channels, outer, 3, padding=1, **options),
        }
        result = self.module(layers[kind](), node)
        self.layers.append((str(result.target), channels, outer))
        return result, outer

    def norm(self) -> tuple[fx.Node, int]:
        node, channels = self.pick()
        affine = self.draw(st.booleans())
        return self.module(batch_norm(channels, affine=affine), node), channels

    def layer_again(self) -> tuple[fx.Node, int]:
        node, channels = self.pick()
        fitting = [(name, outer) for name, inner, outer in self.layers if inner == channels]
        if not fitting:
            return self.norm()
        name, outer = self.draw(st.sampled_from(fitting))
        return self.graph.call_module(name, (node,)), outer

    def unary(self) -> tuple[fx.Node, int]:
        node, channels = self.pick()
        return self.graph.call_function(self.draw(st.sampled_from(_UNARY)), (node,)), channels

    def pool(self) -> tuple[fx.Node, int]:
        node, channels = self.pick()
        pool = self.draw(st.sampled_from([F.max_pool2d, F.avg_pool2d]))
        window = {"kernel_size": 3, "stride": 1, "padding": 1}
        return self.graph.call_function(pool, (node,), window), channels

    def binary(self) -> tuple[fx.Node, int]:
        node, channels = self.pick()
        function = self.draw(st.sampled_from([torch.add, torch.add, torch.mul, torch.sub]))
        others = [other for other, width in self.values if width == channels]
        other = self.draw(st.sampled_from(others))
        return self.graph.call_function(function, (node, other)), channels

    def cat(self) -> tuple[fx.Node, int]:
        (a, left), (b, right) = self.pick(), self.pick()
        return self.graph.call_function(torch.cat, ((a, b),), {"dim": 1}), left + right

    def build(self) -> fx.GraphModule:
        steps = [
            *(self.convolution, self.convolution, self.norm, self.norm, self.unary),
            *(self.binary, self.binary, self.pool, self.cat, self.layer_again),
        ]
        for step in self.draw(st.lists(st.sampled_from(steps), min_size=2, max_size=12)):
            self.values.append(step())
        # Several outputs now and then: a value that is also returned must not be fused away.
        count = self.draw(st.sampled_from([1, 1, 2]))
        self.graph.output(tuple(node for node, _ in self.values[-count:]))
        graph_module = fx.GraphModule(self.root, self.graph)
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        return graph_module


@st.composite
def graphs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> fx.GraphModule:
    torch.manual_seed(0)
    return Builder(draw).build()


class Watch(fx.Interpreter):
    """Asserts that every value lies in the range that was inferred for it."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        found = n.meta.get("range")
        if found is not None and isinstance(value, Tensor):
            assert (value >= found.low - 1e-6 * abs(found.low)).all(), (n.name, found)
            assert (value <= found.high + 1e-6 * abs(found.high)).all(), (n.name, found)
        return value


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(), st.booleans(), st.booleans())
def test_exact_passes_keep_outputs(
    graph_module: fx.GraphModule, blocks: bool, residual: bool
) -> None:
    probe = (torch.randn(2, 4, _SIZE, _SIZE, generator=torch.Generator().manual_seed(2)),)
    fuse = FuseConvBnRelu(InsideBlocks(), residual=residual) if blocks else FuseConvBnRelu(
        residual=residual
    )  # fmt: skip
    steps: list[Pass] = [FoldBatchNorm(), fuse, InferRanges()]
    # The pipeline compares the outputs before and after each of them.
    Pipeline(steps).run(graph_module, probe)
    with torch.no_grad():
        Watch(graph_module).run(*probe)
    text = listing.to_text(graph_module)
    for step in steps:
        assert not step.run(graph_module).modified, step.name
    assert listing.to_text(graph_module) == text
