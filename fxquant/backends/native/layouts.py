"""Where results go before anything is planned: slices of concatenations, borders for their readers.

The readers of a value decide its layout, so that this looks at the graph from its end.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.values import Border, Buffer, Value, image_strides
from fxquant.kernels.calls import operator_arguments

__all__ = ["Layouts"]

OPS: Any = torch.ops.fxquant
_SAME_MEMORY = (torch.chunk, torch.split, operator.getitem)


_PRODUCTS = (
    OPS.linear.default,
    OPS.linear_accumulate.default,
    OPS.matmul.default,
    OPS.weighted_mean.default,
    OPS.matmul_accumulate.default,
)


class Layouts:
    """The border that each value needs, and the slices of what concatenations put together."""

    def __init__(self, graph: fx.Graph, shapes: Mapping[fx.Node, Any]) -> None:
        self.shapes = shapes
        self.borders: dict[fx.Node, Border] = {}
        self.places: dict[fx.Node, Value] = {}
        self.stands_for: dict[fx.Node, fx.Node] = {}
        for node in reversed(graph.nodes):
            self._look_at(node)

    def place(self, node: fx.Node) -> Value | None:
        """Where the result of a node must go."""
        return self.places.get(self.stands_for.get(node, node))

    def fresh(self, node: fx.Node, like: Tensor, follow: Value | None = None) -> Value:
        """Memory for the result of a node that has no place yet.

        Like `follow`, where the order of its dimensions says something; else as an image, whose
        channels are innermost, or in the order of the dimensions.
        """
        node = self.stands_for.get(node, node)
        if follow is not None and follow.buffer.place == "input":
            follow = None
        image = like.dim() == 4 if follow is None else _is_image(follow, like)
        image = image and node.target not in _PRODUCTS
        if image:
            return self.image(like.shape, like.dtype, self.borders.get(node, Border()))
        behind = _order_behind(node)
        if behind is not None and len(behind) == like.dim():
            order = behind
        elif follow is None or follow.tensor.dim() != like.dim():
            order = [0, 2, 1] if like.dim() == 3 and _is_line(node) else list(range(like.dim()))
        else:
            order = sorted(range(like.dim()), key=lambda d: (d > 0, -follow.strides[d]))
        if like.dim() == 3 and order == [0, 2, 1]:
            border = self.borders.get(node, Border())
            image_shape = (like.shape[0], like.shape[1], 1, like.shape[2])
            line = self.image(image_shape, like.dtype, border)
            return Value(line.tensor.squeeze(2), line.buffer)
        meta = torch.empty([like.shape[d] for d in order], dtype=like.dtype, device="meta")
        back = sorted(range(like.dim()), key=order.__getitem__)
        return Value(meta.permute(back), Buffer("arena", meta.nbytes))

    def image(self, shape: Any, dtype: torch.dtype, border: Border) -> Value:
        """[N, C, H, W] with its channels innermost; fewer than four take four bytes a pixel."""
        channels = int(shape[1])
        pixel = 4 if channels < 4 and dtype.itemsize == 1 else channels
        if dtype.itemsize != 1:
            border = Border()
        strides, offset, size = image_strides(shape, border, pixel)
        storage = torch.empty(size, dtype=dtype, device="meta")
        tensor = storage.as_strided(tuple(shape), strides, offset)
        buffer = Buffer("arena", size * dtype.itemsize, border=border, image=tensor)
        return Value(tensor, buffer)

    def zero_point(self, node: fx.Node) -> int:
        """What the border of a node's result holds."""
        grid = self.stands_for.get(node, node).meta.get("grid")
        return int(grid.zero_point) if grid is not None else 0

    # -- looking -------------------------------------------------------------------------

    def _look_at(self, node: fx.Node) -> None:
        if node.target in (OPS.conv.default, OPS.conv_accumulate.default):
            self._ask_for_border(node)
        elif node.target in _SAME_MEMORY:
            for source in node.all_input_nodes:
                self._need(source, self.borders.get(node, Border()))
        elif node.target is torch.cat:
            self._put_together(node)

    def _ask_for_border(self, node: fx.Node) -> None:
        arguments = operator_arguments(node)
        padding = [
            int(self.shapes[pad] if isinstance(pad, fx.Node) else pad)
            for pad in arguments["padding"]
        ]
        source = arguments["x"]
        if self.shapes[source].dtype.itemsize == 1 and len(padding) <= 2:
            self._need(source, Border(*([0] * (2 - len(padding)) + padding)))

    def _need(self, node: fx.Node, border: Border) -> None:
        self.borders[node] = self.borders.get(node, Border()) | border

    def _put_together(self, node: fx.Node) -> None:
        """Give the operands of a concatenation of channels their places in its result."""
        result = self.shapes[node]
        operands, dim = _concatenation(node)
        if result.dim() != 4 or dim % 4 != 1 or len(set(operands)) < len(operands):
            return
        if any(n in self.places for n in operands):
            self._is_part_of_another(node, operands)
            return
        whole = self.places.get(node) or self.fresh(node, result)
        self.places[node] = whole
        start = 0
        for operand in operands:
            channels = self.shapes[operand].shape[1]
            part = whole.tensor.narrow(1, start, channels)
            start += channels
            if _can_write_anywhere(operand) and operand not in self.places:
                self.places[operand] = Value(part, whole.buffer)

    def _is_part_of_another(self, node: fx.Node, operands: list[fx.Node]) -> None:
        """Where its operands lie side by side in a later concatenation, it is a slice of that."""
        places = [self.places.get(operand) for operand in operands]
        first = places[0]
        if node in self.places or first is None or self.borders.get(node):
            return
        at, channels = first.tensor.storage_offset(), 0
        for place in places:
            if place is None or place.buffer is not first.buffer:
                return
            if place.tensor.storage_offset() != at + channels:
                return
            channels += place.shape[1]
        shape = (first.shape[0], channels, *first.shape[2:])
        whole = first.tensor.as_strided(shape, first.strides, first.tensor.storage_offset())
        self.places[node] = Value(whole, first.buffer)


def _is_image(value: Value, like: Tensor) -> bool:
    return (
        like.dim() == 4
        and value.tensor.dim() == 4
        and value.strides[1] == 1
        and (like.shape[1] > 1 or value.buffer.image is not None)
    )


def _order_behind(node: fx.Node) -> list[int] | None:
    """The order in which the one reader of a product wants its dimensions."""
    if node.target not in _PRODUCTS or len(node.users) != 1:
        return None
    (reader,) = node.users
    if reader.target is not torch.permute:
        return None
    order: Any = reader.args[1] if len(reader.args) > 1 else reader.kwargs["dims"]
    # Columns must stay next to each other, and samples apart.
    return list(order) if order[0] == 0 and order[-1] == len(order) - 1 else None


def _is_line(node: fx.Node) -> bool:
    """Whether a result of three dimensions is [N, C, L]: that of a convolution or a pooling."""
    return node.target in (
        OPS.conv.default,
        OPS.conv_transpose.default,
        OPS.conv_accumulate.default,
        OPS.max_pool.default,
        OPS.avg_pool.default,
        OPS.adaptive_avg_pool.default,
    )


def _can_write_anywhere(node: fx.Node) -> bool:
    """Whether a node's kernel writes to the place that it is given."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "fxquant":
        return True
    return target is torch.cat


def _concatenation(node: fx.Node) -> tuple[list[fx.Node], int]:
    operands: Any = node.args[0] if node.args else node.kwargs["tensors"]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return list(operands), int(dim)
