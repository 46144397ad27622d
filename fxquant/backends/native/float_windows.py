"""Pooling, means and sums of floats, which no quantizer follows: one kernel on images."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.values import Value
from fxquant.backends.native.windows import Windows, pooling

__all__ = ["lower_float_mean", "lower_float_pool"]

_MAXIMUM, _MEAN, _SUM = 0, 1, 2
_ONE: Windows = ([(0, 1)], 1)


def lower_float_pool(planner: Planner, node: fx.Node) -> Value:
    """Maxima and averages over windows of one or two dimensions, adaptive ones included."""
    arguments = _arguments(planner, node)
    if arguments.get("return_indices"):
        raise UnsupportedError(node, "it gives indices")
    x = _floats(planner, node)
    shape = planner.shapes[node].shape
    if len(shape) not in (3, 4) or len(shape) - len(_sizes(arguments)) != 2:
        raise UnsupportedError(node, "it is no image of a batch")
    windows, counts = pooling(arguments, x.shape, shape)
    rows, columns = (windows.get(axis, _ONE) for axis in (len(shape) - 2, len(shape) - 1))
    if len(shape) == 3:
        rows = _ONE
    y = planner.allocate(x)
    image, source = _image(y.tensor), _channels_inside(planner, x)
    if image.shape[1] > 1 and image.stride(1) != 1:
        raise UnsupportedError(node, "its channels lie apart")
    kind = _MAXIMUM if node.target in (F.max_pool1d, F.max_pool2d) else _MEAN
    counts = counts.expand(image.shape[2:])
    _emit(planner, (source, _image(source.tensor)), (y, image), (rows, columns), counts, kind)
    return y


def lower_float_mean(planner: Planner, node: fx.Node) -> Value:
    """`mean` and `sum` over some dimensions."""
    arguments = _arguments(planner, node)
    x = _floats(planner, node)
    if arguments.get("dtype") not in (None, torch.float32):
        raise UnsupportedError(node, "its result has another type")
    rank = len(x.shape)
    dims = arguments.get("dim")
    dims = range(rank) if dims is None else dims if isinstance(dims, (tuple, list)) else (dims,)
    over = sorted(d % rank for d in dims) or list(range(rank))
    if planner.batched and 0 in over:
        raise UnsupportedError(node, "it mixes samples")
    head = [0] if planner.batched else []
    kept = [d for d in range(rank) if d not in over and d not in head]
    order = [*head, *over, *kept]
    pixels, channels = (math.prod(x.shape[d] for d in group) for group in (over, kept))
    images = (x.shape[0] if head else 1, pixels, channels)
    rows = _view(x.tensor.permute(order), images)
    if rows is None or (channels > 1 and rows.stride(2) != 1):
        dense = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device="meta")
        x = planner.copied(x, dense.permute(sorted(range(rank), key=order.__getitem__)))
        rows = dense.view(images)
    y = planner.dense(planner.shapes[node])
    result = y.tensor.view(images[0], 1, channels)
    kind = _MEAN if node.target is torch.mean else _SUM
    counts = torch.tensor([[pixels]], dtype=torch.float64)
    image, out = (t.movedim(2, 1).unsqueeze(2) for t in (rows, result))
    _emit(planner, (x, image), (y, out), (_ONE, ([(0, pixels)], 1)), counts, kind)
    return y


def _view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    try:
        return tensor.view(shape)
    except RuntimeError:  # Its strides do not allow it.
        return None


def _emit(
    planner: Planner,
    source: tuple[Value, Tensor],
    target: tuple[Value, Tensor],
    windows: tuple[Windows, Windows],
    counts: Tensor,
    kind: int,
) -> None:
    """`source` and `target` are values, and how they look as images [N, C, H, W]."""
    (rows, row_step), (columns, column_step) = windows
    x, y = source[0], target[0]
    batch, channels, height, width = target[1].shape
    fields: dict[str, Any] = {
        "row_range": planner.numbers([n for pair in rows for n in pair], torch.int32),
        "column_range": planner.numbers([n for pair in columns for n in pair], torch.int32),
        "counts": planner.data(counts.contiguous()),
        "batch": planner.count(batch),
        "height": height,
        "width": width,
        "channels": channels,
        "row_step": row_step,
        "column_step": column_step,
        "kind": kind,
    }
    for name, (value, image) in (("x", source), ("y", target)):
        fields |= {
            name: planner.at(value),
            f"{name}_batch": image.stride(0),
            f"{name}_row": image.stride(2),
            f"{name}_pixel": image.stride(3),
        }
    size = max((b - a) for a, b in rows) * max((b - a) for a, b in columns)
    planner.emit("pool_rows", fields, (x,), (y,), 0.2 * math.prod(y.shape) * max(size, 1))


def _floats(planner: Planner, node: fx.Node) -> Value:
    x = planner.value(node.all_input_nodes[0])
    if x.dtype != torch.float32 or not x.tensor.numel():
        raise UnsupportedError(node, f"it reads {x.dtype}")
    return x


def _arguments(planner: Planner, node: fx.Node) -> dict[str, Any]:
    found: Any = fx.map_arg(dict(node.kwargs), planner.values.__getitem__)
    if len(node.args) > 1:
        raise UnsupportedError(node, "it is not in canonical form")
    return dict(found)


def _sizes(arguments: dict[str, Any]) -> Any:
    return arguments.get("output_size") or arguments["kernel_size"]


def _image(tensor: Tensor) -> Tensor:
    """[N, C, L] with a height of 1."""
    return tensor if tensor.dim() == 4 else tensor.unsqueeze(2)


def _channels_inside(planner: Planner, x: Value) -> Value:
    if x.strides[1] == 1 or x.shape[1] == 1:
        return x
    dense = planner.ending_with(x.tensor, 1)
    planner.copy(x, dense)
    return dense
