"""Pooling and means: fast kernels for windows of an image, else a plain one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.elementwise import codes_fields, optional
from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import type_number
from fxquant.backends.native.values import Value

__all__ = ["Windows", "lower_windows", "pooling"]

OPS: Any = torch.ops.fxquant
_MAXIMUM, _AVERAGE, _SUM = 0, 1, 2
# Begin and end of a window along one dimension, and the step inside of it.
Windows = tuple[list[tuple[int, int]], int]


def lower_windows(planner: Planner, node: fx.Node) -> Value:
    """`max_pool`, `avg_pool`, `adaptive_avg_pool`, `mean` and `sum_accumulate`."""
    arguments = planner.arguments(node)
    x = planner.value(arguments["x"])
    shape = planner.shapes[node].shape
    if node.target in (OPS.mean.default, OPS.sum_accumulate.default):
        axes = [d % x.tensor.dim() for d in arguments["dim"]] or list(range(x.tensor.dim()))
        kept = tuple(1 if d in axes else n for d, n in enumerate(x.shape))
        windows: dict[int, Windows] = {d: ([(0, x.shape[d])], 1) for d in axes}
        count = torch.tensor(math.prod(x.shape[d] for d in axes), dtype=torch.float64)
        if planner.batched and 0 in axes:
            raise UnsupportedError(node, "it mixes samples")
    else:
        kept = tuple(shape)
        windows, count = pooling(arguments, x.shape, kept)
    factors: Tensor | None = None
    kind = _MAXIMUM if node.target is OPS.max_pool.default else _AVERAGE
    if node.target is OPS.sum_accumulate.default:
        kind = _SUM
    if kind == _AVERAGE:
        factors = (arguments["x_scale"] / (count * arguments["scale"])).to(torch.float32)
    y = planner.allocate(x if len(kept) == len(shape) else None)
    whole = Value(_keeping(y.tensor, kept, windows), y.buffer)
    if kind != _SUM and _fast(planner, arguments, x, whole, windows, factors):
        return y
    _plain(planner, arguments, x, whole, windows, factors, kind)
    return y


def _keeping(tensor: Tensor, kept: tuple[int, ...], windows: dict[int, Windows]) -> Tensor:
    """`tensor` with the dimensions that a mean has dropped, of size 1."""
    if tensor.dim() < len(kept):
        for axis in sorted(windows):
            tensor = tensor.unsqueeze(axis)
    return tensor


def pooling(
    arguments: dict[str, Any], image: Sequence[int], shape: Sequence[int]
) -> tuple[dict[int, Windows], Tensor]:
    """The windows of a pooling by dimension, and how many elements torch counts in each.

    `image` and `shape` are those of input and output; the arguments of an adaptive pooling have
    an ``output_size``.
    """
    windows: dict[int, Windows] = {}
    rank = len(image)
    count = torch.ones((), dtype=torch.float64)
    if "output_size" in arguments:
        spatial = len(arguments["output_size"])
        for axis in range(rank - spatial, rank):
            size, outputs = image[axis], shape[axis]
            ranges = [(i * size // outputs, -((i + 1) * size // -outputs)) for i in range(outputs)]
            windows[axis] = (ranges, 1)
            lengths = torch.tensor([stop - start for start, stop in ranges], dtype=torch.float64)
            count = count.unsqueeze(-1) * lengths
        return windows, count
    kernel = arguments["kernel_size"]
    strides = arguments["stride"] or kernel
    dilations = arguments.get("dilation", [1] * len(kernel))
    for index, axis in enumerate(range(rank - len(kernel), rank)):
        size, pad, step = image[axis], arguments["padding"][index], dilations[index]
        ranges, counts = [], []
        for output in range(shape[axis]):
            start = output * strides[index] - pad
            stop = start + step * (kernel[index] - 1) + 1
            counts.append(_length(start, stop, size, pad, arguments))
            first = start if start >= 0 else start + -(start // step) * step
            ranges.append((first, min(stop, size)))
        windows[axis] = (ranges, step)
        count = count.unsqueeze(-1) * torch.tensor(counts, dtype=torch.float64)
    override = arguments.get("divisor_override")
    return windows, count if override is None else torch.full_like(count, override)


def _length(start: int, stop: int, size: int, pad: int, arguments: dict[str, Any]) -> int:
    """How many positions a window averages over, as torch counts them."""
    stop = min(stop, size + pad)
    if not arguments.get("count_include_pad", True):
        start, stop = max(start, 0), min(stop, size)
    return stop - start


def _fast(
    planner: Planner,
    arguments: dict[str, Any],
    x: Value,
    y: Value,
    windows: dict[int, Windows],
    factors: Tensor | None,
) -> bool:
    """Emit a fast kernel, where height and width of an image of bytes are what windows lie in."""
    image, out = x.tensor, y.tensor
    if {x.dtype, y.dtype} != {torch.uint8} or not y.tensor.numel() or image.dim() not in (3, 4):
        return False
    if image.dim() == 3 and set(windows) == {2}:
        image, out = image.unsqueeze(2), out.unsqueeze(2)
        windows = {2: ([(0, 1)], 1), 3: windows[2]}
    if image.dim() == 3 and set(windows) == {1} and not planner.batched:
        return False
    if image.dim() == 3 and set(windows) == {1}:
        image, out = (t.movedim(-1, 1).unsqueeze(2) for t in (image, out))
        windows = {2: ([(0, 1)], 1), 3: windows[1]}
    if image.dim() != 4 or set(windows) != {2, 3}:
        return False
    if any(t.shape[1] > 1 and t.stride(1) != 1 for t in (image, out)):
        return False
    rows, columns = windows[2], windows[3]
    if any(start >= stop for start, stop in (*rows[0], *columns[0])):
        return False
    fields: dict[str, Any] = {
        "row_range": planner.numbers([n for pair in rows[0] for n in pair], torch.int32),
        "column_range": planner.numbers([n for pair in columns[0] for n in pair], torch.int32),
        "batch": planner.count(out.shape[0]),
        "height": out.shape[2],
        "width": out.shape[3],
        "channels": out.shape[1],
    }
    for name, value, tensor in (("x", x, image), ("y", y, out)):
        fields |= {
            name: planner.at(value),
            f"{name}_batch": tensor.stride(0),
            f"{name}_row": tensor.stride(2),
            f"{name}_pixel": tensor.stride(3),
        }
    size = max(1, math.prod(stop - start for start, stop in (rows[0][-1], columns[0][-1])))
    work = math.prod(y.shape) * (0.1 * size + 0.2)
    if factors is None:
        fields |= {"row_step": rows[1], "column_step": columns[1]}
        planner.emit("max_pool", fields, (x,), (y,), work)
        return True
    spread = factors if factors.dim() == 2 else factors.reshape(1, -1)
    table = spread.expand(out.shape[2], out.shape[3]).contiguous()
    fields |= codes_fields(arguments) | {
        "multiplier": planner.data(table),
        "x_zero_point": arguments["x_zero_point"],
        "table": optional(planner, planner.table_behind()),
    }
    planner.emit("avg_pool", fields, (x,), (y,), work)
    return True


def _plain(
    planner: Planner,
    arguments: dict[str, Any],
    x: Value,
    y: Value,
    windows: dict[int, Windows],
    factors: Tensor | None,
    kind: int,
) -> None:
    rank = x.tensor.dim()
    if rank > 6 or (planner.batched and rank > 6):
        raise UnsupportedError(planner.current, "a tensor of too many dimensions")
    # Of a batch, dimension 0 counts samples; else a dimension of size 1 stands before all others.
    front = 0 if planner.batched else 1
    if rank + front > 6:
        raise UnsupportedError(planner.current, "a tensor of too many dimensions")
    fill = 6 - rank - front
    table: list[int] = []
    starts = [-1] * 6
    steps = [1] * 6
    for axis, (ranges, step) in windows.items():
        at = axis + front + (fill if axis + front else 0)
        starts[at] = len(table) // 2
        steps[at] = step
        table += [n for pair in ranges for n in pair]

    def spread(values: list[int], filler: int) -> list[int]:
        head = [filler] if front else values[:1]
        return head + [filler] * fill + (values if front else values[1:])

    f_strides = [0] * rank
    if factors is not None and factors.dim():
        for index, axis in enumerate(sorted(windows)):
            f_strides[axis] = factors.stride(index)
    kept = list(y.shape)
    fields: dict[str, Any] = {
        "x": planner.at(x),
        "y": planner.at(y),
        "shape": planner.numbers(spread(kept, 1)),
        "x_strides": planner.numbers(spread(list(x.strides), 0)),
        "y_strides": planner.numbers(spread(list(y.strides), 0)),
        "f_strides": planner.numbers(spread(f_strides, 0)),
        "windows": planner.numbers(table or [0]),
        "starts": planner.numbers(starts),
        "steps": planner.numbers(steps),
        "samples": planner.samples(y),
        "kind": kind,
        "x_type": type_number(x.dtype),
        "y_type": type_number(y.dtype),
        "x_zero_point": arguments.get("x_zero_point", 0),
    }
    if factors is not None:
        fields |= codes_fields(arguments) | {"factors": planner.data(factors.reshape(-1))}
    planner.emit("plain_reduce", fields, (x,), (y,), 4.0 * math.prod(x.shape))
