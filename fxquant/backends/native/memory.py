"""Memory for values: their layouts, their borders, and copies between them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.emitter import Emitter, UnsupportedError
from fxquant.backends.native.layouts import Layouts
from fxquant.backends.native.values import Border, Buffer, Loops, Value

__all__ = ["Memory"]

_IMAGE = ("batch", "row", "pixel", "channel")


class Memory(Emitter):
    """Gives values a place, and emits the steps that fill borders and copy."""

    def __init__(self, graph: fx.Graph, shapes: Mapping[fx.Node, Any], batch: int | None) -> None:
        super().__init__(next(iter(graph.nodes)), batch)
        self.shapes = shapes
        self.layouts = Layouts(graph, shapes)

    def allocate(self, follow: Value | None = None) -> Value:
        """Memory for the result of the node at hand: its place in a concatenation, or its own.

        Images have their channels innermost, and the border that their readers ask for; other
        results follow the order of dimensions of `follow`.
        """
        node = self.current
        like = self.shapes[node]
        wanted = self.layouts.place(node)
        if wanted is not None:
            self._fill_border(wanted, node)
            return wanted
        value = self.layouts.fresh(node, like, follow)
        self._fill_border(value, node)
        return value

    @contextlib.contextmanager
    def standing_for(self, node: fx.Node) -> Iterator[None]:
        """Allocate for another node than the one at hand."""
        before, self.current = self.current, node
        try:
            yield
        finally:
            self.current = before

    def ordered(self, like: Tensor, follow: Value) -> Value:
        """Memory of its own, dense, in the order of the dimensions of `follow`."""
        order = sorted(range(like.dim()), key=lambda d: (d > 0, -follow.strides[d]))
        meta = torch.empty([like.shape[d] for d in order], dtype=like.dtype, device="meta")
        back = sorted(range(like.dim()), key=order.__getitem__)
        return Value(meta.permute(back), Buffer("arena", meta.nbytes))

    def dense(self, like: Tensor) -> Value:
        """Memory of its own, in the order of the dimensions."""
        meta = torch.empty(like.shape, dtype=like.dtype, device="meta")
        return Value(meta, Buffer("arena", meta.nbytes))

    def ending_with(self, like: Tensor, axis: int) -> Value:
        """Memory of its own, dense, in the order of the dimensions but for `axis`, the last."""
        meta = torch.empty(like.movedim(axis, -1).shape, dtype=like.dtype, device="meta")
        return Value(meta.movedim(-1, axis), Buffer("arena", meta.nbytes))

    def copied(self, source: Value, like: Tensor) -> Value:
        """A copy in memory of its own, of the dense strides of the meta tensor `like`."""
        value = Value(like, Buffer("arena", like.nbytes))
        self.copy(source, value)
        return value

    def bordered(
        self, shape: Sequence[int], dtype: torch.dtype, border: Border, zero: int
    ) -> Value:
        """An image with a border that holds `zero`."""
        value = self.layouts.image(shape, dtype, border)
        self._fill(value.buffer, zero)
        return value

    def _fill_border(self, value: Value, node: fx.Node) -> None:
        if value.buffer.border and value.buffer.filled is None:
            self._fill(value.buffer, self.layouts.zero_point(node))

    def _fill(self, buffer: Buffer, zero: int) -> None:
        image = buffer.image
        buffer.filled = zero
        if image is None or not buffer.border:
            return
        value = Value(image, buffer)
        samples, _, height, width = image.shape
        batch, _, row, pixel = (stride * image.itemsize for stride in image.stride())
        if image.itemsize != 1:
            raise UnsupportedError(self.current, "borders are of 8-bit codes")
        self.emit(
            "fill_border",
            {
                "y": self.at(value),
                "y_batch": batch,
                "y_row": row,
                "y_pixel": pixel,
                "batch": self.count(samples),
                "height": height,
                "width": width,
                "rows": buffer.border.rows,
                "columns": buffer.border.columns,
                "value": zero,
            },
            reads=(),
            writes=(value,),
            work=0.05 * (buffer.size - image.numel()) / (self.batch or 1),
            is_border=True,
        )

    def copy(self, source: Value, target: Value) -> None:
        """Element by element, from one layout to another."""
        if source.dtype.itemsize == 1 and self._copy_bytes(source, target):
            return
        loops = self.loops(target.shape, target.strides, source.strides)
        if loops is None:
            raise UnsupportedError(self.current, "a tensor of too many dimensions")
        shape, y_strides, x_strides = loops
        fields = {
            "x": self.at(source),
            "y": self.at(target),
            "shape": shape,
            "x_strides": x_strides,
            "y_strides": y_strides,
            "samples": self.samples(target),
            "size": source.dtype.itemsize,
        }
        self.emit("plain_copy", fields, (source,), (target,), 1.0 * math.prod(target.shape))

    def _copy_bytes(self, source: Value, target: Value) -> bool:
        if not target.tensor.numel() or (self.batched and not target.shape):
            return False
        rows = [target.strides, source.strides]
        padded = Loops.of(target.shape, rows, self.batched).padded(4, self.batched)
        if padded is None or max(padded.sizes) >= 2**31:
            return False
        fields: dict[str, Any] = {
            "batch": self.count(padded.sizes[0]) if self.batched else padded.sizes[0],
            "height": padded.sizes[1],
            "width": padded.sizes[2],
            "channels": padded.sizes[3],
        }
        for name, value, row in zip("yx", (target, source), padded.strides, strict=True):
            fields[name] = self.at(value)
            fields |= zip((f"{name}_{key}" for key in _IMAGE), row, strict=True)
        self.emit("copy", fields, (source,), (target,), 0.3 * math.prod(target.shape))
        return True
