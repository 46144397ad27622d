"""Data movement: torch's own functions on strides; what is no view is copied or gathered."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.values import Value

unflatten: Any = torch.unflatten

__all__ = ["lower_cat", "lower_item", "lower_movement", "lower_same", "lower_shuffle"]


def lower_movement(planner: Planner, node: fx.Node) -> Any:
    """A function that moves the elements of one tensor: reshape, permute, slices, roll, padding."""
    if node.kwargs.get("mode", "nearest") not in ("nearest", "nearest-exact", "constant"):
        raise UnsupportedError(node, "it computes new elements")
    sources = [n for n in node.all_input_nodes if _is_tensor(planner, n)]
    if len(sources) != 1:
        raise UnsupportedError(node, f"it moves {len(sources)} tensors")
    if isinstance(planner.values[sources[0]], Tensor):
        return _apply(planner, node, {sources[0]: planner.values[sources[0]]})
    x = planner.value(sources[0])
    result = _apply(planner, node, {sources[0]: x.tensor})
    views = _views(result, x)
    if views is not None:
        return views
    assert isinstance(result, Tensor)
    if _is_reshape(node) and result.numel() == x.tensor.numel():
        dense = planner.dense(x.tensor)
        planner.copy(x, dense)
        return Value(dense.tensor.reshape(result.shape), dense.buffer)
    return _gather(planner, node, sources[0], x)


def _is_tensor(planner: Planner, node: fx.Node) -> bool:
    return isinstance(planner.values[node], (Value, Tensor))


def _apply(planner: Planner, node: fx.Node, tensors: dict[fx.Node, Tensor]) -> Any:
    def operand(n: fx.Node) -> Any:
        return tensors[n] if n in tensors else planner.values[n]

    args: Any = fx.map_arg(node.args, operand)
    kwargs: Any = fx.map_arg(node.kwargs, operand)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def _views(result: Any, x: Value) -> Any:
    """The result as views of `x`, None where it is not made of views."""
    if isinstance(result, Tensor):
        storage = result.untyped_storage()._cdata
        same = storage == x.tensor.untyped_storage()._cdata
        return Value(result, x.buffer) if same else None
    if isinstance(result, (tuple, list)):
        parts = [_views(part, x) for part in result]
        return None if any(part is None for part in parts) else tuple(parts)
    return None


def _is_reshape(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name in ("reshape", "flatten", "unflatten", "contiguous", "clone", "view")


def _gather(planner: Planner, node: fx.Node, source: fx.Node, x: Value) -> Value:
    """Where every element of the result comes from, as torch moves the numbers of the elements."""
    batch = planner.batch or 1
    stride = x.strides[0] * (x.shape[0] // batch) if planner.batched else 0
    storage = x.tensor.untyped_storage().nbytes() // x.dtype.itemsize
    numbers = torch.arange(storage).as_strided(x.shape, x.strides, x.tensor.storage_offset())
    numbers = numbers - x.tensor.storage_offset()
    fill = 0
    if node.target is F.pad:
        value: Any = node.kwargs.get("value") or 0
        fill = int(value)
    index = _moved(planner, node, source, numbers)
    y = planner.allocate()
    y_tensor, rows = unflatten(y.tensor, 0, (batch, -1)), unflatten(index, 0, (batch, -1))
    for sample in range(1, batch):
        expected = torch.where(rows[0] < 0, rows[0], rows[0] + sample * stride)
        if not torch.equal(rows[sample], expected):
            raise UnsupportedError(node, "it mixes samples")
    order = sorted(range(1, y_tensor.dim()), key=lambda d: -y_tensor.stride(d))
    sizes = [y_tensor.shape[d] for d in order]
    strides = [y_tensor.stride(d) for d in order]
    flat = rows[0].permute([d - 1 for d in order]).contiguous()
    if len(sizes) > 5:
        raise UnsupportedError(node, "a tensor of too many dimensions")
    # Work is split over the first dimension behind the batch.
    fill_in = 5 - len(sizes)
    shape = [batch, *sizes[:1], *([1] * fill_in), *sizes[1:]]
    y_strides = [y_tensor.stride(0), *strides[:1], *([0] * fill_in), *strides[1:]]
    fields = {
        "x": planner.at(x),
        "y": planner.at(y),
        "index": planner.data(flat),
        "shape": planner.numbers(shape),
        "y_strides": planner.numbers(y_strides),
        "samples": planner.count(batch) if planner.batched else 1,
        "x_stride": stride,
        "fill": fill if x.dtype != torch.float32 else _bits(fill),
        "size": x.dtype.itemsize,
    }
    planner.emit("plain_gather", fields, (x,), (y,), 1.5 * math.prod(y.shape))
    return y


def _bits(value: int) -> int:
    return int(torch.tensor(float(value)).view(torch.int32))


def _moved(planner: Planner, node: fx.Node, source: fx.Node, numbers: Tensor) -> Tensor:
    if node.target is F.pad and node.kwargs.get("mode", "constant") == "constant":
        kwargs = {**node.kwargs, "value": -1}
        pad: Any = F.pad
        args: Any = fx.map_arg(node.args, lambda n: numbers if n is source else planner.values[n])
        padded: Tensor = pad(*args, **kwargs)
        return padded
    try:
        result = _apply(planner, node, {source: numbers})
    except (NotImplementedError, RuntimeError):
        # Torch interpolates floats: of float64 the numbers are exact.
        result = _apply(planner, node, {source: numbers.to(torch.float64)}).to(torch.int64)
    if not isinstance(result, Tensor):
        raise UnsupportedError(node, "it moves a tensor into several")
    return result


def lower_item(planner: Planner, node: fx.Node) -> Any:
    """One of several results, or a slice of a tensor."""
    source: Any = node.args[0]
    found = planner.values[source]
    if isinstance(found, (tuple, list)):
        index: Any = node.args[1]
        return found[index]
    return lower_movement(planner, node)


def lower_same(planner: Planner, node: fx.Node) -> Any:
    """What changes nothing that matters here."""
    return planner.values[node.all_input_nodes[0]]


def lower_cat(planner: Planner, node: fx.Node) -> Value:
    """Operands that lie in their places already are not copied."""
    operands: Any = node.args[0] if node.args else node.kwargs["tensors"]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    stacks = node.target is torch.stack
    values = [planner.value(operand) for operand in operands]
    if planner.batched and dim % planner.shapes[node].dim() == 0:
        raise UnsupportedError(node, "it mixes samples")
    follow = None if stacks else max(values, key=lambda value: value.tensor.numel())
    y = planner.allocate(follow)
    start = 0
    for value in values:
        if stacks:
            part = Value(y.tensor.select(dim, start), y.buffer)
            start += 1
        else:
            length = value.tensor.shape[dim]
            part = Value(y.tensor.narrow(dim, start, length), y.buffer)
            start += length
        in_place = (
            value.buffer is part.buffer
            and value.offset == part.offset
            and _real_strides(value) == _real_strides(part)
        )
        if not in_place:
            planner.copy(value, part)
    return y


def _real_strides(value: Value) -> list[int]:
    return [s for s, n in zip(value.strides, value.shape, strict=True) if n > 1]


def lower_shuffle(planner: Planner, node: fx.Node) -> Value:
    """Channels of several groups in turn: one strided copy for each group."""
    x = planner.value(node.all_input_nodes[0])
    groups: Any = node.kwargs["groups"] if "groups" in node.kwargs else node.args[1]
    y = planner.allocate(x)
    sources, targets = unflatten(x.tensor, 1, (groups, -1)), unflatten(y.tensor, 1, (-1, groups))
    for group in range(groups):
        planner.copy(
            Value(sources.select(1, group), x.buffer), Value(targets.select(2, group), y.buffer)
        )
    return y
