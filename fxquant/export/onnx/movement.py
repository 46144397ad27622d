"""Data movement: the same operators on codes and on floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from fxquant.export.onnx.writer import Writer

__all__ = [
    "argument",
    "emit_cat",
    "emit_chunk",
    "emit_expand",
    "emit_flip",
    "emit_getitem",
    "emit_interpolate",
    "emit_narrow",
    "emit_pad",
    "emit_permute",
    "emit_reshape",
    "emit_roll",
    "emit_same",
    "emit_select",
    "emit_shuffle",
    "emit_stack",
    "emit_transpose",
]

_END = 2**62


def argument(node: fx.Node, index: int, *names: str, default: Any = ...) -> Any:
    """An argument of a torch function, by position or by any of its names."""
    if len(node.args) > index:
        return node.args[index]
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    if default is ...:
        raise TypeError(f"{node.name} has no argument {names}")
    return default


def emit_same(w: Writer, node: fx.Node) -> ir.Value:
    """What changes nothing that an ONNX value has."""
    return w.value(node.all_input_nodes[0])


def emit_reshape(w: Writer, node: fx.Node) -> ir.Value:
    """Every function that gives the elements another shape in the same order."""
    source = node.all_input_nodes[0]
    if w.shapes[source] == w.shapes[node]:
        return w.value(source)
    return w.reshaped(w.value(source), node)


def emit_permute(w: Writer, node: fx.Node) -> ir.Value:
    """Transpose."""
    dims: Any = argument(node, 1, "dims")
    dims = dims if isinstance(dims, (tuple, list)) else node.args[1:]
    rank = len(w.sizes(node))
    return w.op("Transpose", w.value(node.args[0]), perm=[d % rank for d in dims])


def emit_transpose(w: Writer, node: fx.Node) -> ir.Value:
    """Two dimensions change places."""
    rank = len(w.sizes(node))
    first, second = argument(node, 1, "dim0") % rank, argument(node, 2, "dim1") % rank
    order = list(range(rank))
    order[first], order[second] = second, first
    return w.op("Transpose", w.value(node.args[0]), perm=order)


def emit_cat(w: Writer, node: fx.Node) -> ir.Value:
    """Concat."""
    operands = [w.value(operand) for operand in argument(node, 0, "tensors")]
    axis = argument(node, 1, "dim", "axis", default=0) % len(w.sizes(node))
    if len(operands) == 1:
        return operands[0]
    return w.op("Concat", *operands, axis=axis)


def emit_stack(w: Writer, node: fx.Node) -> ir.Value:
    """Unsqueeze and Concat."""
    axis = argument(node, 1, "dim", default=0) % len(w.sizes(node))
    axes = w.numbers(axis)
    operands = [w.op("Unsqueeze", w.value(x), axes) for x in argument(node, 0, "tensors")]
    return w.op("Concat", *operands, axis=axis)


def emit_chunk(w: Writer, node: fx.Node) -> tuple[ir.Value, ...]:
    """Split, for chunk, split and unbind's sizes alike."""
    source: Any = node.args[0]
    axis = argument(node, 2, "dim", default=0) % len(w.sizes(source))
    parts = w.shapes.values[node.name]
    if w.shapes[source].batched[axis]:
        raise w.refusal("it splits the batch")
    sizes = w.numbers(*(part.sizes[axis] for part in parts))
    if len(parts) == 1:
        return (w.value(source),)
    return w.ops("Split", len(parts), w.value(source), sizes, axis=axis)


def _slice(
    w: Writer, x: ir.Value, axes: Sequence[int], bounds: Sequence[tuple[int, int, int]]
) -> ir.Value:
    starts, ends, steps = zip(*bounds, strict=True)
    return w.op(
        "Slice", x, w.numbers(*starts), w.numbers(*ends), w.numbers(*axes), w.numbers(*steps)
    )


def emit_getitem(w: Writer, node: fx.Node) -> Any:
    """One of several results, or Slice, Squeeze and Unsqueeze."""
    source: Any = node.args[0]
    found = w.values.get(source)
    index: Any = node.args[1]
    if isinstance(found, tuple):
        return found[index]
    x = w.value(source)
    index = index if isinstance(index, tuple) else (index,)
    rank = len(w.sizes(source))
    taken = sum(part is not None and part is not Ellipsis for part in index)
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index = (*index[:place], *[slice(None)] * (rank - taken), *index[place + 1 :])
    axes: list[int] = []
    bounds: list[tuple[int, int, int]] = []
    axis = 0
    for part in index:
        if part is None:
            continue
        if not isinstance(part, (slice, int)):
            raise w.refusal(f"it is indexed with a {type(part).__name__}")
        size = w.sizes(source)[axis]
        if isinstance(part, int):
            if w.shapes[source].batched[axis]:
                raise w.refusal("it takes one sample of the batch")
            axes.append(axis)
            bounds.append((part % size, part % size + 1, 1))
        elif part != slice(None):
            if w.shapes[source].batched[axis] and w.shapes.symbolic:
                raise w.refusal("it takes a part of the batch")
            start, stop, step = part.indices(size)
            if (start, stop, step) != (0, size, 1):
                axes.append(axis)
                bounds.append((start, stop, step))
        axis += 1
    if bounds:
        x = _slice(w, x, axes, bounds)
    if any(part is None or isinstance(part, int) for part in index):
        x = w.reshaped(x, node)
    return x


def emit_narrow(w: Writer, node: fx.Node) -> ir.Value:
    """Slice along one dimension."""
    source: Any = node.args[0]
    axis = argument(node, 1, "dim") % len(w.sizes(source))
    start = argument(node, 2, "start")
    length = argument(node, 3, "length")
    return _slice(w, w.value(source), [axis], [(start, start + length, 1)])


def emit_select(w: Writer, node: fx.Node) -> ir.Value:
    """One index of one dimension."""
    source: Any = node.args[0]
    axis = argument(node, 1, "dim") % len(w.sizes(source))
    index = argument(node, 2, "index") % w.sizes(source)[axis]
    return w.reshaped(_slice(w, w.value(source), [axis], [(index, index + 1, 1)]), node)


def emit_flip(w: Writer, node: fx.Node) -> ir.Value:
    """Slice with negative steps."""
    dims: Any = argument(node, 1, "dims")
    dims = dims if isinstance(dims, (tuple, list)) else node.args[1:]
    axes = [d % len(w.sizes(node)) for d in dims]
    return _slice(w, w.value(node.args[0]), axes, [(-1, -_END, -1)] * len(axes))


def emit_roll(w: Writer, node: fx.Node) -> ir.Value:
    """Two slices change places, dimension after dimension."""
    x = w.value(node.args[0])
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims")
    sizes = w.sizes(node)
    pairs = zip(*(v if isinstance(v, (tuple, list)) else (v,) for v in (shifts, dims)), strict=True)
    for shift, dim in pairs:
        axis = dim % len(sizes)
        if w.shapes[node].batched[axis]:
            raise w.refusal("it rolls the batch")
        cut = -shift % sizes[axis]
        if cut:
            tail = _slice(w, x, [axis], [(cut, _END, 1)])
            x = w.op("Concat", tail, _slice(w, x, [axis], [(0, cut, 1)]), axis=axis)
    return x


def emit_pad(w: Writer, node: fx.Node) -> ir.Value:
    """Pad with a constant, a reflection or the edge."""
    source: Any = node.args[0]
    x, dtype = w.value(source), w.shapes[source].dtype
    pads = argument(node, 1, "pad")
    mode = argument(node, 2, "mode", default="constant")
    value = argument(node, 3, "value", default=None) or 0
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    rank = len(w.sizes(source))
    before, behind = [0] * rank, [0] * rank
    for index in range(len(pads) // 2):
        before[rank - 1 - index], behind[rank - 1 - index] = pads[2 * index : 2 * index + 2]
    # ONNX Runtime pads no 16-bit integers.
    kind = torch.int32 if dtype == torch.int16 else dtype
    x = w.cast(x, kind) if kind != dtype else x
    inputs = [x, w.numbers(*before, *behind)]
    if mode == "constant":
        inputs.append(w.scalar(value, kind))
    x = w.op("Pad", *inputs, mode=modes[mode])
    return w.cast(x, dtype) if kind != dtype else x


def emit_expand(w: Writer, node: fx.Node) -> ir.Value:
    """Expand, to a batch that is known at run time only."""
    shape = w.shapes[node]
    return w.op("Expand", w.value(node.args[0]), w.shape(shape.sizes, shape.batched))


def emit_shuffle(w: Writer, node: fx.Node) -> ir.Value:
    """Channels of several groups in turn: a transposition of [groups, channels / groups]."""
    source: Any = node.args[0]
    groups = argument(node, 1, "groups")
    batch, channels, *spatial = w.shapes[source].fixed
    x = w.reshape(w.value(source), [batch, groups, channels // groups, *spatial])
    order = [0, 2, 1, *range(3, 3 + len(spatial))]
    return w.reshaped(w.op("Transpose", x, perm=order), node)


def emit_interpolate(w: Writer, node: fx.Node) -> ir.Value:
    """Resize to fixed sizes; nearest as torch takes it, ``⌊i · in / out⌋``."""
    source: Any = node.args[0]
    x, dtype = w.value(source), w.shapes[source].dtype
    mode = argument(node, 3, "mode", default="nearest")
    corners = argument(node, 4, "align_corners", default=None)
    sizes = w.sizes(node)
    old = w.sizes(source)
    options: dict[str, Any]
    if mode == "nearest":
        options = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
    elif mode in ("bilinear", "linear", "trilinear") and dtype.is_floating_point:
        coordinates = "align_corners" if corners else "half_pixel"
        options = {"mode": "linear", "coordinate_transformation_mode": coordinates}
    else:
        raise w.refusal(f"it interpolates {dtype} by {mode}")
    factors = torch.tensor([1.0, 1.0, *(b / a for a, b in zip(old[2:], sizes[2:], strict=True))])
    scales = w.constant(factors, "resize_factors")
    return w.op("Resize", x, None, scales, **options)


RESHAPES = (
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.squeeze,
    torch.unsqueeze,
    "reshape",
    "view",
    "flatten",
    "squeeze",
    "unsqueeze",
)
MOVEMENT: dict[Any, Any] = {
    **dict.fromkeys(RESHAPES, emit_reshape),
    **dict.fromkeys((torch.permute, "permute"), emit_permute),
    **dict.fromkeys((torch.transpose, "transpose"), emit_transpose),
    torch.cat: emit_cat,
    torch.stack: emit_stack,
    torch.chunk: emit_chunk,
    torch.split: emit_chunk,
    torch.narrow: emit_narrow,
    torch.select: emit_select,
    torch.flip: emit_flip,
    torch.roll: emit_roll,
    torch.channel_shuffle: emit_shuffle,
    F.channel_shuffle: emit_shuffle,
    F.pad: emit_pad,
    F.interpolate: emit_interpolate,
    "expand": emit_expand,
    **dict.fromkeys(("contiguous", "clone", torch.clone), emit_same),
}
"""Functions of torch that move elements."""
