"""Everything but layers on torch's kernels: boundaries, additions, tables, pooling, movement."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.backends.x86 import tables
from fxquant.backends.x86.lowering import Lower, Lowered, Lowering, Plain
from fxquant.kernels.calls import operator_arguments
from fxquant.to_integer import Grid
from passes import tensor_info

__all__ = [
    "ON_QUANTIZED",
    "lower_channel_affine",
    "lower_dequantize",
    "lower_lookup",
    "lower_max_pool",
    "lower_movement",
    "lower_pair",
    "lower_pool",
    "lower_quantize",
]

OPS: Any = torch.ops.fxquant
Q: Any = torch.ops.quantized


def lower_quantize(lowering: Lowering, node: fx.Node) -> Lowered:
    """Float to quantized tensor; fewer than 8 bits are clamped inside the container."""
    a = operator_arguments(node)
    x = lowering.other(a["x"])
    q = lowering.emit(torch.quantize_per_tensor, x, a["scale"], a["zero_point"], torch.quint8)
    return lowering.clamp(q, node, a["qmin"], a["qmax"])


def lower_dequantize(lowering: Lowering, node: fx.Node) -> Lowered:
    """Quantized tensor to float; plain integers keep the reference operator."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source not in lowering.values or lowering.values[source].quantized is None:
        return None
    call = lowering.graph.call_method("dequantize", (lowering.quantized(source),))
    return lowering.annotate(call)


def lower_pair(name: str) -> Lower:
    """The lowering of an addition or product, with the ReLU that its bounds hold."""

    def lower(lowering: Lowering, node: fx.Node) -> Lowered:
        a = operator_arguments(node)
        relu = a["qmin"] == a["zero_point"] > 0
        target = getattr(Q, f"{name}_relu" if relu else name).default
        operands = (lowering.quantized(a["a"]), lowering.quantized(a["b"]))
        lowered = lowering.emit(target, *operands, a["scale"], a["zero_point"])
        return lowering.clamp(lowered, node, 0 if relu else a["qmin"], a["qmax"])

    return lower


def lower_channel_affine(lowering: Lowering, node: fx.Node) -> Lowered:
    """A batch norm by itself, in two and three dimensions."""
    a = operator_arguments(node)
    info = tensor_info(node)
    if info is None or len(info.shape) not in (4, 5):
        return None
    weight, bias = lowering.tensor(a["weight"]), lowering.tensor(a["bias"])
    assert weight is not None
    target = Q.batch_norm2d.default if len(info.shape) == 4 else Q.batch_norm3d.default
    zeros = lowering.attribute(f"{node.name}_mean", torch.zeros_like(weight))
    ones = lowering.attribute(f"{node.name}_var", torch.ones_like(weight))
    lowered = lowering.emit(
        target,
        lowering.quantized(a["x"]),
        lowering.attribute(f"{node.name}_weight", weight),
        lowering.attribute(f"{node.name}_bias", bias),
        zeros,
        ones,
        0.0,
        a["scale"],
        a["zero_point"],
    )
    return lowering.clamp(lowered, node, a["qmin"], a["qmax"])


def lower_lookup(lowering: Lowering, node: fx.Node) -> Lowered:
    """A table of 256 entries as the fastest kernel that gives its values."""
    source, constant = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(constant, fx.Node)
    table = lowering.tensor(constant)
    assert table is not None
    x, before, grid = lowering.quantized(source), source.meta["grid"], node.meta["grid"]
    kernel = tables.find_kernel(table, *before.input, *grid.input)
    if kernel is None:
        constants = {"table": table, "pairs": tables.pair_table(table)}
        nodes = [lowering.attribute(f"{node.name}_{key}", constants[key]) for key in constants]
        return lowering.emit(tables.lookup, x, *nodes, *grid.input)
    if not kernel.in_float:
        return lowering.emit(kernel.target, x, *kernel.arguments)
    floats = lowering.annotate(lowering.graph.call_method("dequantize", (x,)))
    y = lowering.emit(kernel.target, floats, *kernel.arguments)
    return lowering.emit(torch.quantize_per_tensor, y, *grid.input, torch.quint8)


def lower_pool(lowering: Lowering, node: fx.Node) -> Lowered:
    """An average; torch's kernels keep the scale, so that another one goes through float."""
    a = operator_arguments(node)
    x = lowering.quantized(a["x"])
    if (a["x_scale"], a["x_zero_point"]) == (a["scale"], a["zero_point"]):
        return _pool(lowering, node, a, x)
    floats = lowering.annotate(lowering.graph.call_method("dequantize", (x,)))
    y = _pool(lowering, node, a, floats)
    if y is None:
        return None
    q = lowering.emit(torch.quantize_per_tensor, y, a["scale"], a["zero_point"], torch.quint8)
    return lowering.clamp(q, node, a["qmin"], a["qmax"])


def _pool(lowering: Lowering, node: fx.Node, a: dict[str, Any], x: fx.Node) -> fx.Node | None:
    if node.target is OPS.mean.default:
        return lower_mean(lowering, node, a, x)
    if node.target is OPS.adaptive_avg_pool.default:
        size = a["output_size"]
        return lowering.emit(getattr(F, f"adaptive_avg_pool{len(size)}d"), x, size)
    kernel = fx.map_arg(a["kernel_size"], lowering.movable)
    stride = fx.map_arg(a["stride"], lowering.movable)
    dimensions = len(kernel)
    if dimensions == 1:
        if a["divisor_override"] is not None:
            return None
        return lowering.emit(
            F.avg_pool1d, x, kernel, stride, a["padding"], a["ceil_mode"], a["count_include_pad"]
        )
    return lowering.emit(
        getattr(F, f"avg_pool{dimensions}d"), x, kernel, stride, a["padding"], a["ceil_mode"],
        a["count_include_pad"], a["divisor_override"],
    )  # fmt: skip


def lower_max_pool(lowering: Lowering, node: fx.Node) -> Lowered:
    """The largest value of each window."""
    a = operator_arguments(node)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    window = (fx.map_arg(a[name], lowering.movable) for name in names)
    pool = getattr(F, f"max_pool{len(a['kernel_size'])}d")
    return lowering.emit(pool, lowering.quantized(a["x"]), *window)


def lower_mean(lowering: Lowering, node: fx.Node, a: dict[str, Any], x: fx.Node) -> fx.Node:
    """Over a whole map, the pooling kernel does the same three times as fast."""
    info = tensor_info(node)
    rank = 4 if info is not None and len(info.shape) == (4 if a["keepdim"] else 2) else 0
    if rank == 4 and sorted(dim % 4 for dim in a["dim"]) == [2, 3]:
        pooled = lowering.emit(F.adaptive_avg_pool2d, x, [1, 1])
        return pooled if a["keepdim"] else lowering.emit(torch.flatten, pooled, 1)
    return lowering.emit(torch.mean, x, a["dim"], keepdim=a["keepdim"])


def lower_movement(lowering: Lowering, node: fx.Node) -> Lowered:
    """Data movement on the integers themselves: the same call on whichever image there is."""
    if node.target not in ON_QUANTIZED and node.op == "call_function":
        return None
    sources = [source for source in node.all_input_nodes if source in lowering.values]
    plain = node.target not in _NEEDS_QUANTIZED and all(map(lowering.is_plain, sources))
    image = lowering.plain if plain else lowering.quantized
    operands = {source: image(source) for source in sources}

    def operand(source: fx.Node) -> fx.Node:
        return operands[source] if source in operands else lowering.others[source]

    if plain:
        return Plain(lowering.annotate(lowering.graph.node_copy(node, operand)))
    if node.target is torch.cat:
        grid: Grid = node.meta["grid"]
        tensors = fx.map_arg(node.args[0], operand)
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return lowering.emit(Q.cat.default, tensors, dim, grid.scale, grid.zero_point)
    return lowering.annotate(lowering.graph.node_copy(node, operand))


ON_QUANTIZED: set[Any] = {
    torch.cat, torch.stack, torch.reshape, torch.flatten, torch.unflatten, torch.permute,
    torch.transpose, torch.unsqueeze, torch.squeeze, torch.chunk, torch.split, F.channel_shuffle,
    F.interpolate, operator.getitem,
}  # fmt: skip
# Interpolation of plain bytes rounds in its own way, and torch shuffles only quantized ones fast.
_NEEDS_QUANTIZED: set[Any] = {F.interpolate, F.channel_shuffle}
