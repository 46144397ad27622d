"""Integer graph → direct calls of torch's int8 kernels on torch quantized tensors.

A table from operator to lowering. What torch has no right kernel for keeps its
`torch.ops.fxquant` operator, between an `int_repr` and the way back; it stays exact.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.backends import x86_kernels as kernels
from fxquant.backends import x86_recurrent as recurrent
from fxquant.backends import x86_tables as tables
from fxquant.backends.rewrites import rewrite_for_x86
from fxquant.to_integer import Grid
from passes import tensor_info

__all__ = ["lower_x86"]

OPS: Any = torch.ops.fxquant
Q: Any = torch.ops.quantized


@dataclass(frozen=True)
class _Value:
    """An integer value of the source graph: as a torch quantized tensor, as plain integers."""

    quantized: fx.Node | None
    plain: fx.Node | None


def lower_x86(integer: fx.GraphModule, keep: frozenset[str] = frozenset()) -> fx.GraphModule:
    """The x86 graph of an integer graph, weights prepacked.

    It is lowered from what `rewrite_for_x86` makes of the integer graph: ``meta["rewritten"]``.
    Nodes that keep the reference operator have ``meta["kernel"] == "reference"``; every node
    that stands for an integer node has its name in ``meta["integer"]``.
    """
    rewritten = rewrite_for_x86(integer)
    lowered = _Lowering(rewritten, keep).lower()
    lowered.meta["rewritten"] = rewritten
    return lowered


class _Lowering:
    def __init__(self, integer: fx.GraphModule, keep: frozenset[str]) -> None:
        self.source = integer
        self.keep = keep
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, _Value] = {}
        self.others: dict[fx.Node, fx.Node] = {}
        self.current: fx.Node = next(iter(integer.graph.nodes))

    def lower(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                self.others[node] = self.graph.node_copy(node)
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.other))
            elif node.op == "get_attr":
                self._get_attr(node)
            elif "grid" in node.meta or node.target in _TO_FLOAT:
                self._integer_node(node)
            else:
                self._copy(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        module = fx.GraphModule(self.root, self.graph, "X86Graph")
        module.delete_all_unused_submodules()
        module.graph.lint()
        return module

    # -- building ------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=self.current.name)
        return self._annotate(node)

    def _annotate(self, node: fx.Node) -> fx.Node:
        for key in ("module_path", "origin", "simulated", "grid", "channel_scale", "function"):
            if key in self.current.meta:
                node.meta[key] = self.current.meta[key]
        node.meta["integer"] = self.current.name
        return node

    def attribute(self, name: str, value: Any) -> fx.Node:
        """A constant of this graph: a tensor or a packed object, as a plain attribute.

        Plain attributes are found without `nn.Module.__getattr__`, which costs as much as a
        small kernel's dispatch.
        """
        name = self._free(name)
        setattr(self.root, name, value)
        node = self.graph.create_node("get_attr", name, (), {}, name=name)
        return self._annotate(node)

    def _free(self, name: str) -> str:
        # The constants of node a_b may be called as those of module a.b are.
        while hasattr(self.root, name):
            name += "_"
        return name

    def tensor(self, node: fx.Node | None) -> Tensor | None:
        """The tensor that a get_attr node of the source graph reads."""
        if node is None:
            return None
        value: Any = self.source
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value

    def _get_attr(self, node: fx.Node) -> None:
        value = self.tensor(node)
        # Read lazily: what is packed must not be held a second time.
        self.others[node] = self.attribute(node.name, value)

    def _copy(self, node: fx.Node) -> None:
        if node.op == "call_module":
            path = str(node.target)
            module = self.source.get_submodule(path)
            name = self._free(path.replace(".", "_"))
            self.root.add_module(name, module)
            args = fx.map_arg(node.args, self.other)
            kwargs = dict(fx.map_arg(node.kwargs, self.other))
            copied = self.graph.create_node("call_module", name, args, kwargs, name=node.name)
        else:
            copied = self.graph.node_copy(node, self.movable)
        self.others[node] = self._annotate(copied)

    # -- values --------------------------------------------------------------------------

    def other(self, node: fx.Node) -> fx.Node:
        return self.others[node] if node in self.others else self.plain(node)

    def movable(self, node: fx.Node) -> fx.Node:
        """For what reads shapes: either image of an integer value."""
        if node in self.others:
            return self.others[node]
        value = self.values[node]
        image = value.quantized or value.plain
        assert image is not None
        return image

    def quantized(self, node: fx.Node) -> fx.Node:
        """An integer value as a torch quantized tensor."""
        value = self.values[node]
        if value.quantized is None:
            assert value.plain is not None
            grid: Grid = node.meta["grid"]
            made = self.graph.call_function(kernels.as_quantized, (value.plain, *grid.input))
            value = _Value(self._annotate(made), value.plain)
            self.values[node] = value
        assert value.quantized is not None
        return value.quantized

    def plain(self, node: fx.Node) -> fx.Node:
        """An integer value as a plain integer tensor."""
        value = self.values[node]
        if value.plain is None:
            assert value.quantized is not None
            plain = self.graph.call_function(kernels.codes, (value.quantized,))
            value = _Value(value.quantized, self._annotate(plain))
            self.values[node] = value
        assert value.plain is not None
        return value.plain

    # -- nodes ---------------------------------------------------------------------------

    def _integer_node(self, node: fx.Node) -> None:
        lowering = _LOWERINGS.get(node.target, _lower_movement)
        eight_bits = all(
            source.meta["grid"].dtype == torch.uint8
            for source in (node, *node.all_input_nodes)
            if "grid" in source.meta
        )
        lowered = lowering(self, node) if eight_bits and node.name not in self.keep else None
        if lowered is None:
            self._keep_reference(node)
        elif "grid" in node.meta:
            self.values[node] = _Value(lowered, None)
        else:
            self.others[node] = lowered

    def _keep_reference(self, node: fx.Node) -> None:
        def operand(source: fx.Node) -> fx.Node:
            return self.plain(source) if source in self.values else self.others[source]

        kept = self._annotate(self.graph.node_copy(node, operand))
        kept.meta["kernel"] = "reference"
        if "grid" in node.meta:
            self.values[node] = _Value(None, kept)
        else:
            self.others[node] = kept

    def clamp(self, lowered: fx.Node, node: fx.Node, qmin: int, qmax: int) -> fx.Node:
        """Bounds that the 8-bit container does not already hold."""
        grid: Grid = node.meta["grid"]
        if qmin <= 0 and qmax >= 255:
            return lowered
        low, high = ((code - grid.zero_point) * grid.scale for code in (qmin, qmax))
        return self.emit(torch.clamp, lowered, low, high)


Lowered = fx.Node | None
Lower = Callable[[_Lowering, fx.Node], Lowered]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by the names of its schema."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    defaults = {
        argument.name: argument.default_value
        for argument in target._schema.arguments
        if argument.has_default_value()
    }
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _float_bias(lowering: _Lowering, a: dict[str, Any]) -> Tensor | None:
    bias, scale = lowering.tensor(a["bias"]), lowering.tensor(a["weight_scale"])
    if bias is None or scale is None:
        return None
    step: Tensor = scale.double() * a["x_scale"]
    return (bias.double() * step).float()


def _lower_quantize(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
    x = lowering.other(a["x"])
    q = lowering.emit(torch.quantize_per_tensor, x, a["scale"], a["zero_point"], torch.quint8)
    return lowering.clamp(q, node, a["qmin"], a["qmax"])


def _lower_dequantize(lowering: _Lowering, node: fx.Node) -> Lowered:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source not in lowering.values or lowering.values[source].quantized is None:
        return None
    call = lowering.graph.call_method("dequantize", (lowering.quantized(source),))
    return lowering._annotate(call)


def _lower_conv(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
    weight, scale = lowering.tensor(a["weight"]), lowering.tensor(a["weight_scale"])
    assert weight is not None
    assert scale is not None
    zero_point = lowering.tensor(a["weight_zero_point"])
    dimensions = weight.dim() - 2
    residual, to_float = a["residual"], a["dtype"] == torch.float32
    depthwise = a["groups"] > 1 and weight.shape[1] == 1
    if zero_point is not None and (depthwise or residual is not None or to_float):
        return None
    if residual is not None and dimensions != 2:
        return None
    x = lowering.quantized(a["x"])
    bias = _float_bias(lowering, a)
    geometry = [list(a[key]) for key in ("stride", "padding", "dilation")]
    if to_float:
        if dimensions == 1:
            return None
        return _conv_to_float(lowering, node, a, x, weight, scale, bias, geometry)
    packed = kernels.pack_conv(
        kernels.quantized_weight(weight, scale, zero_point),
        bias,
        geometry,
        a["groups"],
        engine_name="onednn" if zero_point is None else "fbgemm",
    )
    constant = lowering.attribute(f"{node.name}_packed", packed)
    output = (constant, a["scale"], a["zero_point"])
    relu = a["qmin"] == a["zero_point"] > 0
    if residual is not None:
        target = kernels.conv_add_relu if relu else kernels.conv_add
        accumulator = lowering.quantized(residual)
        if _is_needed_again(residual, node):
            accumulator = lowering.emit(torch.clone, accumulator)
        lowered = lowering.emit(target, x, accumulator, *output)
    else:
        name = f"conv{dimensions}d_relu" if relu else f"conv{dimensions}d"
        lowered = lowering.emit(
            getattr(getattr(Q, name), "new", None) or getattr(Q, name).default, x, *output
        )
    return lowering.clamp(lowered, node, 0 if relu else a["qmin"], a["qmax"])


def _is_needed_again(residual: fx.Node, node: fx.Node) -> bool:
    """Whether more than `node` needs the memory of `residual`, which the kernel writes over."""
    readers = list(residual.users)
    views = residual.target in _ON_QUANTIZED or any(r.target in _ON_QUANTIZED for r in readers)
    return views or residual is node.args[0] or any(node < reader for reader in readers)


def _conv_to_float(
    lowering: _Lowering,
    node: fx.Node,
    a: dict[str, Any],
    x: fx.Node,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    geometry: list[list[int]],
) -> fx.Node:
    scale = scale.expand(weight.shape[0]).contiguous()
    packed = torch.ops.onednn.qconv_prepack(
        weight, scale, a["x_scale"], a["x_zero_point"], *geometry, a["groups"], None
    )
    zeros = torch.zeros(weight.shape[0], dtype=torch.long)
    constants = [
        lowering.attribute(f"{node.name}_{key}", value)
        for key, value in {"packed": packed, "scale": scale, "zeros": zeros}.items()
    ]
    bias_node = None if bias is None else lowering.attribute(f"{node.name}_bias", bias)
    return lowering.emit(
        kernels.conv_float, x, a["x_scale"], a["x_zero_point"], *constants, bias_node, *geometry,
        a["groups"],
    )  # fmt: skip


def _lower_conv_transpose(lowering: _Lowering, node: fx.Node) -> Lowered:
    # Only QNNPACK's kernel is exact, in one and two dimensions and without groups, and it is
    # many times slower than the others: the reference's exact sums in float are no slower.
    return None


def _lower_linear(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
    weight, scale = lowering.tensor(a["weight"]), lowering.tensor(a["weight_scale"])
    assert weight is not None
    assert scale is not None
    zero_point = lowering.tensor(a["weight_zero_point"])
    if a["residual"] is not None:
        return None
    bias = _float_bias(lowering, a)
    if a["dtype"] == torch.float32:
        if zero_point is not None:
            return None
        scale = scale.expand(weight.shape[0]).contiguous()
        packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        constants = {
            "packed": packed,
            "scale": scale,
            "zeros": torch.zeros(weight.shape[0], dtype=torch.long),
        }
        nodes = [
            lowering.attribute(f"{node.name}_{key}", value) for key, value in constants.items()
        ]
        bias_node = None if bias is None else lowering.attribute(f"{node.name}_bias", bias)
        x = lowering.quantized(a["x"])
        return lowering.emit(
            kernels.linear_float, x, a["x_scale"], a["x_zero_point"], *nodes, bias_node
        )
    packed = kernels.pack_linear(kernels.quantized_weight(weight, scale, zero_point), bias)
    constant = lowering.attribute(f"{node.name}_packed", packed)
    relu = a["qmin"] == a["zero_point"] > 0
    target = Q.linear_relu.default if relu else Q.linear.default
    lowered = lowering.emit(
        target, lowering.quantized(a["x"]), constant, a["scale"], a["zero_point"]
    )
    return lowering.clamp(lowered, node, 0 if relu else a["qmin"], a["qmax"])


def _lower_pair(name: str) -> Lower:
    def lower(lowering: _Lowering, node: fx.Node) -> Lowered:
        a = _arguments(node)
        relu = a["qmin"] == a["zero_point"] > 0
        target = getattr(Q, f"{name}_relu" if relu else name).default
        operands = (lowering.quantized(a["a"]), lowering.quantized(a["b"]))
        lowered = lowering.emit(target, *operands, a["scale"], a["zero_point"])
        return lowering.clamp(lowered, node, 0 if relu else a["qmin"], a["qmax"])

    return lower


def _lower_channel_affine(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
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


def _lower_lookup(lowering: _Lowering, node: fx.Node) -> Lowered:
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
    floats = lowering._annotate(lowering.graph.call_method("dequantize", (x,)))
    y = lowering.emit(kernel.target, floats, *kernel.arguments)
    return lowering.emit(torch.quantize_per_tensor, y, *grid.input, torch.quint8)


def _lower_pool(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
    if (a["x_scale"], a["x_zero_point"]) != (a["scale"], a["zero_point"]):
        return None
    x = lowering.quantized(a["x"])
    if node.target is OPS.mean.default:
        return _lower_mean(lowering, node, a, x)
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


def _lower_max_pool(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    window = (fx.map_arg(a[name], lowering.movable) for name in names)
    pool = getattr(F, f"max_pool{len(a['kernel_size'])}d")
    return lowering.emit(pool, lowering.quantized(a["x"]), *window)


def _lower_mean(lowering: _Lowering, node: fx.Node, a: dict[str, Any], x: fx.Node) -> fx.Node:
    """Over a whole map, the pooling kernel does the same three times as fast."""
    info = tensor_info(node)
    rank = 4 if info is not None and len(info.shape) == (4 if a["keepdim"] else 2) else 0
    if rank == 4 and sorted(dim % 4 for dim in a["dim"]) == [2, 3]:
        pooled = lowering.emit(F.adaptive_avg_pool2d, x, [1, 1])
        return pooled if a["keepdim"] else lowering.emit(torch.flatten, pooled, 1)
    return lowering.emit(torch.mean, x, a["dim"], keepdim=a["keepdim"])


def _lower_movement(lowering: _Lowering, node: fx.Node) -> Lowered:
    """Data movement on the integers themselves: the same call on quantized tensors."""
    if node.target not in _ON_QUANTIZED and node.op == "call_function":
        return None
    operands = {
        source: lowering.quantized(source)
        for source in node.all_input_nodes
        if source in lowering.values
    }

    def operand(source: fx.Node) -> fx.Node:
        return operands[source] if source in operands else lowering.others[source]

    if node.target is torch.cat:
        grid: Grid = node.meta["grid"]
        tensors = fx.map_arg(node.args[0], operand)
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return lowering.emit(Q.cat.default, tensors, dim, grid.scale, grid.zero_point)
    return lowering._annotate(lowering.graph.node_copy(node, operand))


_ON_QUANTIZED: set[Any] = {
    torch.cat, torch.stack, torch.reshape, torch.flatten, torch.unflatten, torch.permute,
    torch.transpose, torch.unsqueeze, torch.squeeze, torch.chunk, torch.split, F.channel_shuffle,
    F.interpolate, operator.getitem,
}  # fmt: skip

_TO_FLOAT: set[Any] = {
    OPS.dequantize.default,
    OPS.conv.default,
    OPS.linear.default,
    OPS.conv_transpose.default,
    OPS.dequantize_weight.default,
    OPS.linear_dynamic.default,
    OPS.lstm_dynamic.default,
    OPS.gru_dynamic.default,
}


def _lower_weight(lowering: _Lowering, node: fx.Node) -> Lowered:
    """A weight that is computed with in float is dequantized once, here."""
    target: Any = node.target
    args = [lowering.tensor(a) if isinstance(a, fx.Node) else a for a in node.args]
    return lowering.attribute(node.name, target(*args))


def _lower_linear_dynamic(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
    weight, scale = lowering.tensor(a["weight"]), lowering.tensor(a["weight_scale"])
    assert weight is not None
    assert scale is not None
    info = tensor_info(a["x"])
    if info is None or len(info.shape) < 2:
        return None
    quantized = kernels.quantized_weight(weight, scale, None)
    packed = kernels.pack_linear(quantized, lowering.tensor(a["bias"]))
    constant = lowering.attribute(f"{node.name}_packed", packed)
    return lowering.emit(Q.linear_dynamic.default, lowering.other(a["x"]), constant)


def _lower_recurrent(lowering: _Lowering, node: fx.Node) -> Lowered:
    a = _arguments(node)
    weights, scales, biases = (
        [tensor for n in a[key] if (tensor := lowering.tensor(n)) is not None]
        for key in ("weights", "scales", "biases")
    )
    constants = [
        lowering.attribute(f"{node.name}_cell{index}", cell)
        for index, cell in enumerate(recurrent.pack_cells(weights, scales, biases))
    ]
    return lowering.emit(
        recurrent.lstm if node.target is OPS.lstm_dynamic.default else recurrent.gru,
        lowering.other(a["x"]),
        [lowering.other(value) for value in a["hx"]],
        constants,
        weights[1].shape[1],
        a["num_layers"],
        a["bidirectional"],
        a["batch_first"],
    )


_LOWERINGS: dict[Any, Lower] = {
    OPS.quantize.default: _lower_quantize,
    OPS.dequantize.default: _lower_dequantize,
    OPS.dequantize_weight.default: _lower_weight,
    OPS.conv.default: _lower_conv,
    OPS.conv_transpose.default: _lower_conv_transpose,
    OPS.linear.default: _lower_linear,
    OPS.add.default: _lower_pair("add"),
    OPS.mul.default: _lower_pair("mul"),
    OPS.channel_affine.default: _lower_channel_affine,
    OPS.lookup.default: _lower_lookup,
    OPS.avg_pool.default: _lower_pool,
    OPS.adaptive_avg_pool.default: _lower_pool,
    OPS.mean.default: _lower_pool,
    OPS.max_pool.default: _lower_max_pool,
    OPS.linear_dynamic.default: _lower_linear_dynamic,
    OPS.lstm_dynamic.default: _lower_recurrent,
    OPS.gru_dynamic.default: _lower_recurrent,
}
