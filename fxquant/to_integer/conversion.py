"""The integer graph under construction, and the images in it of each simulated value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

import fxquant.kernels  # noqa: F401  (registers torch.ops.fxquant)
from fxquant.plan.plan import Plan
from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.to_integer.grid import Grid
from passes import tensor_info
from passes.infra.meta import copy_meta

__all__ = ["OPS", "Conversion", "Integers"]

OPS: Any = torch.ops.fxquant


@dataclass(frozen=True)
class Integers:
    """Integers of the graph; `channels` are the scales of a value that has one a channel."""

    node: fx.Node
    grid: Grid
    channels: Tensor | None = None


class Conversion:
    """What every emitter works on.

    A simulated value has up to two images: `integers`, with the grid that they lie on, and
    `floats`; what is no tensor, such as a size, is in `plain`. `current` is the simulated node
    that is being emitted; `output_channels` are its output's scales where it has one a channel.
    """

    def __init__(self, simulated: fx.GraphModule, plan: Plan) -> None:
        self.source = simulated
        self.plan = plan
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.integers: dict[fx.Node, Integers] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.plain: dict[fx.Node, fx.Node] = {}
        self.output_channels: Tensor | None = None
        self.current: fx.Node = next(iter(simulated.graph.nodes))

    # -- building ------------------------------------------------------------------------

    def emit(
        self, target: Any, args: tuple[Any, ...], grid: Grid | None, name: str | None = None
    ) -> fx.Node:
        """A call in the integer graph that stands for the current simulated node."""
        node = self.graph.create_node(
            "call_function", target, args, {}, name=name or self.current.name
        )
        return self.annotate(node, grid)

    def annotate(self, node: fx.Node, grid: Grid | None) -> fx.Node:
        """Note where a node comes from, and the grid of its integers."""
        copy_meta(self.current, node, "place")
        node.meta["simulated"] = self.current.name
        if grid is not None:
            node.meta["grid"] = grid
        return node

    def constant(self, path: str, value: Tensor) -> fx.Node:
        """A node that reads `value`, stored at `path` of the integer graph."""
        *parents, leaf = path.split(".")
        owner = self.owner(parents)
        value = value.detach()
        # The model may read a layer's weight as a plain tensor beside calling the layer.
        while leaf in owner._buffers and not _same(cast(Tensor, owner._buffers[leaf]), value):
            leaf += "_"
        if leaf not in owner._buffers:
            owner.register_buffer(leaf, value)
        return self.annotate(self.graph.get_attr(".".join([*parents, leaf])), None)

    def tensor(self, node: fx.Node) -> Tensor:
        """The tensor that a get_attr node of the simulated graph reads."""
        value: Any = self.source
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return cast(Tensor, value)

    def is_quantizer(self, node: fx.Node) -> bool:
        """Whether a simulated node calls an activation quantizer."""
        return node.op == "call_module" and isinstance(
            self.source.get_submodule(str(node.target)), ActivationQuantizer
        )

    # -- values --------------------------------------------------------------------------

    def float_image(self, node: fx.Node) -> fx.Node:
        """The float image of a simulated value, dequantized once where it has none."""
        if node not in self.floats and tensor_info(node) is None:
            # Several tensors at once, as `chunk` gives: moved once more, as floats.
            args = fx.map_arg(node.args, self.float_or_plain)
            kwargs = dict(fx.map_arg(node.kwargs, self.float_or_plain))
            again = self.graph.create_node(node.op, node.target, args, kwargs)
            self.floats[node] = self.annotate(again, None)
        elif node not in self.floats:
            value = self.integers[node]
            self.floats[node] = self.emit(
                OPS.dequantize.default,
                (value.node, *value.grid.input),
                None,
                f"{node.name}_float",
            )
        return self.floats[node]

    def float_or_plain(self, node: fx.Node) -> fx.Node:
        """What a float operation reads: the float image, or what is no tensor."""
        return self.plain[node] if node in self.plain else self.float_image(node)

    def movable(self, node: fx.Node) -> fx.Node:
        """Whatever image there is: for operations that only read shapes or move data."""
        if node in self.plain:
            return self.plain[node]
        return self.integers[node].node if node in self.integers else self.floats[node]

    def copy_module(self, path: str, module: nn.Module) -> None:
        """Put a float module that has no functional form into the integer graph."""
        *parents, leaf = path.split(".")
        self.owner(parents).add_module(leaf, module)

    def owner(self, parents: list[str]) -> nn.Module:
        """The module at a path of the integer graph, made where it is missing."""
        owner = self.root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = cast(nn.Module, owner._modules[part])
        return owner


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
