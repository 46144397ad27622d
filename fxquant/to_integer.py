"""Simulated graph → integer graph: `torch.ops.fxquant.*` on plain integer tensors.

Each value of the simulated graph has up to two images in the integer graph: integers (with the
grid that they lie on) and floats. An operation is emitted on integers when the value behind it
passes a quantizer, because only then is its output grid known; that is why emission of an
operation waits for the quantizer that follows it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant.kernels  # noqa: F401  (registers torch.ops.fxquant)
from fxquant.dynamic import emit_dynamic, has_batch_dimension
from fxquant.functional_forms import functional_form
from fxquant.integer import build_table
from fxquant.operations import Kind, table_function
from fxquant.plan import Plan
from fxquant.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.spec import QParams
from passes import FusedLayer, add_relu

__all__ = ["Grid", "to_integer"]

OPS: Any = torch.ops.fxquant


@dataclass(frozen=True)
class Grid:
    """What the integers of a value mean: ``x = scale · (q − zero_point)``."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: torch.dtype

    def output(self, low: int | None = None, high: int | None = None) -> tuple[Any, ...]:
        """The trailing arguments of an operator that writes this grid, clamped further."""
        qmin = self.qmin if low is None else max(self.qmin, low)
        qmax = self.qmax if high is None else min(self.qmax, high)
        return (self.scale, self.zero_point, qmin, qmax, self.dtype)

    def code(self, value: float) -> int:
        """The code of a real `value`, rounded as quantize rounds."""
        return round(value / self.scale) + self.zero_point

    @property
    def input(self) -> tuple[float, int]:
        """The scale and zero point as operators take them."""
        return (self.scale, self.zero_point)


@dataclass(frozen=True)
class _Integers:
    """Integers of the graph; `channels` are the scales of a value that has one a channel."""

    node: fx.Node
    grid: Grid
    channels: Tensor | None = None


def to_integer(simulated: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Build the integer graph of a calibrated simulated graph.

    Every integer node carries its `Grid` in ``meta["grid"]`` and the simulated node that it
    stands for in ``meta["simulated"]``.
    """
    return _Conversion(simulated, plan).convert()


class _Conversion:
    def __init__(self, simulated: fx.GraphModule, plan: Plan) -> None:
        self.source = simulated
        self.plan = plan
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.integers: dict[fx.Node, _Integers] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.output_channels: Tensor | None = None
        self.plain: dict[fx.Node, fx.Node] = {}  # sizes and other values that are no tensors
        self.current: fx.Node = next(iter(simulated.graph.nodes))

    def convert(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                self.floats[node] = self.graph.node_copy(node)
            elif node.op == "get_attr":
                self.floats[node] = self._constant(str(node.target), self._tensor(node))
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._float_or_plain))
            elif self._is_quantizer(node):
                self._quantizer(node)
            elif node.name in self.plan.dynamic:
                self.floats[node] = self._dynamic(node)
            elif self.plan.runs_on_integers(node):
                self._integer_operation(node)
            else:
                self._float_operation(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, "IntegerGraph")

    # -- building ------------------------------------------------------------------------

    def _emit(
        self, target: Any, args: tuple[Any, ...], grid: Grid | None, name: str | None = None
    ) -> fx.Node:
        node = self.graph.create_node(
            "call_function", target, args, {}, name=name or self.current.name
        )
        return self._annotate(node, grid)

    def _annotate(self, node: fx.Node, grid: Grid | None) -> fx.Node:
        for key in ("module_path", "origin", "stack_trace"):
            if key in self.current.meta:
                node.meta[key] = self.current.meta[key]
        node.meta["simulated"] = self.current.name
        if grid is not None:
            node.meta["grid"] = grid
        return node

    def _constant(self, path: str, value: Tensor) -> fx.Node:
        *parents, leaf = path.split(".")
        owner = self.root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = cast(nn.Module, owner._modules[part])
        value = value.detach()
        # The model may read a layer's weight as a plain tensor beside calling the layer.
        while leaf in owner._buffers and not _same(cast(Tensor, owner._buffers[leaf]), value):
            leaf += "_"
        if leaf not in owner._buffers:
            owner.register_buffer(leaf, value)
        return self._annotate(self.graph.get_attr(".".join([*parents, leaf])), None)

    def _tensor(self, node: fx.Node) -> Tensor:
        value: Any = self.source
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return cast(Tensor, value)

    def _is_quantizer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(
            self.source.get_submodule(str(node.target)), ActivationQuantizer
        )

    # -- values --------------------------------------------------------------------------

    def _float(self, node: fx.Node) -> fx.Node:
        """The float image of a simulated value, dequantized once where it has none."""
        if node not in self.floats:
            value = self.integers[node]
            self.floats[node] = self._emit(
                OPS.dequantize.default,
                (value.node, *value.grid.input),
                None,
                f"{node.name}_float",
            )
        return self.floats[node]

    def _float_or_plain(self, node: fx.Node) -> fx.Node:
        return self.plain[node] if node in self.plain else self._float(node)

    def _movable(self, node: fx.Node) -> fx.Node:
        """Whatever image there is: for operations that only read shapes or move data."""
        if node in self.plain:
            return self.plain[node]
        return self.integers[node].node if node in self.integers else self.floats[node]

    # -- simulated nodes -----------------------------------------------------------------

    def _quantizer(self, node: fx.Node) -> None:
        value = node.all_input_nodes[0]
        module = self.source.get_submodule(str(node.target))
        assert isinstance(module, ActivationQuantizer)
        qparams = module.qparams
        channels = None if qparams.axis is None else qparams.scale
        self.output_channels = channels
        grid = Grid(
            float(qparams.scale.amax()),
            int(qparams.zero_point[0]),
            qparams.qmin,
            qparams.qmax,
            qparams.dtype,
        )
        if value.op not in ("placeholder", "get_attr") and self.plan.runs_on_integers(value):
            self.current = value
            emitted = _EMITTERS[self.plan.kinds[value.name]](self, value, grid)
        else:
            emitted = self._emit(OPS.quantize.default, (self.floats[value], *grid.output()), grid)
        if channels is not None:
            emitted.meta["channel_scale"] = channels
        self.output_channels = None
        self.integers[node] = _Integers(emitted, grid, channels)

    def _integer_operation(self, node: fx.Node) -> None:
        kind = self.plan.kinds[node.name]
        if kind in (Kind.MOVE, Kind.SELECT):
            self._move(node)
        elif not any(self._is_quantizer(user) for user in node.users):
            self.floats[node] = self._layer_in_float_out(node)
        # Everything else is emitted when its quantizer comes.

    def _move(self, node: fx.Node) -> None:
        operand = next(source for source in node.all_input_nodes if source in self.integers)
        grid = self.integers[operand].grid
        args = fx.map_arg(node.args, self._movable)
        kwargs = dict(fx.map_arg(node.kwargs, self._movable))
        if node.target is F.pad:
            kwargs["value"] = grid.zero_point
        target: Any = node.target
        if target in (F.max_pool1d, F.max_pool2d, F.max_pool3d):
            emitted = self._max_pool(node, args[0], kwargs, grid)
        elif target is F.interpolate and grid.dtype != torch.uint8:
            # Torch repeats no 16-bit integers; the floats that they stand for give them back.
            floats = self._emit(OPS.dequantize.default, (args[0], *grid.input), None)
            repeated = self.graph.create_node("call_function", target, (floats,), kwargs)
            emitted = self._emit(
                OPS.quantize.default, (self._annotate(repeated, None), *grid.output()), grid
            )
        else:
            emitted = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
            self._annotate(emitted, grid)
        self.integers[node] = _Integers(emitted, grid)

    def _max_pool(self, node: fx.Node, x: Any, kwargs: dict[str, Any], grid: Grid) -> fx.Node:
        target: Any = node.target
        dimensions = int(target.__name__[-2])
        kernel = _expand(kwargs["kernel_size"], dimensions)
        stride = kwargs.get("stride")
        args = (
            x,
            kernel,
            kernel if stride in (None, ()) else _expand(stride, dimensions),
            _expand(kwargs.get("padding", 0), dimensions),
            _expand(kwargs.get("dilation", 1), dimensions),
            bool(kwargs.get("ceil_mode", False)),
        )
        return self._emit(OPS.max_pool.default, args, grid)

    # -- float operations ----------------------------------------------------------------

    def _float_operation(self, node: fx.Node) -> None:
        if node.meta.get("tensor") is None and not _makes_tensors(node):
            args = fx.map_arg(node.args, self._movable)
            kwargs = fx.map_arg(node.kwargs, self._movable)
            copied = self.graph.create_node(
                node.op, node.target, args, dict(kwargs), name=node.name
            )
            self.plain[node] = self._annotate(copied, None)
            return
        args = fx.map_arg(node.args, self._float_or_plain)
        kwargs = dict(fx.map_arg(node.kwargs, self._float_or_plain))
        if node.op != "call_module":
            emitted = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
            self.floats[node] = self._annotate(emitted, None)
            return
        path = str(node.target)
        module = self.source.get_submodule(path)
        if isinstance(module, FusedLayer):
            self.floats[node] = self._float_layer(path, module, *args)
            return
        form = functional_form(module)
        if form is None:
            self._copy_module(path, module)
            emitted = self.graph.create_node("call_module", path, args, kwargs, name=node.name)
            self.floats[node] = self._annotate(emitted, None)
            return

        def constant(name: str) -> fx.Node:
            return self._constant(f"{path}.{name}", operator.attrgetter(name)(module))

        def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
            created = self.graph.create_node("call_function", target, args, kwargs)
            return self._annotate(created, None)

        self.floats[node] = form(module, constant, call, args, kwargs)

    def _dynamic(self, node: fx.Node) -> fx.Node:
        """A layer that quantizes its own input at run time: float in, float out."""
        path = str(node.target)
        module = self.source.get_submodule(path)
        args = fx.map_arg(node.args, self._float_or_plain)
        kwargs = dict(fx.map_arg(node.kwargs, self._float_or_plain))
        y = emit_dynamic(
            path,
            module,
            args,
            kwargs,
            batched=has_batch_dimension(node),
            constant=self._constant,
            call=lambda target, operands: self._emit(target, operands, None),
        )
        if len(args) > 1 and isinstance(module, FusedLayer):
            y = self._emit(torch.add, (y, args[1]), None)
        return self._activate(y, _activation(self.source, node))

    def _copy_module(self, path: str, module: nn.Module) -> None:
        *parents, leaf = path.split(".")
        owner = self.root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = cast(nn.Module, owner._modules[part])
        owner.add_module(leaf, module)

    def _float_layer(self, path: str, module: FusedLayer, x: Any, *residual: Any) -> fx.Node:
        """A layer that computes in float, its weight dequantized from integers if it has a grid."""
        layer: Any = module.layer
        quantizer = module.weight_quantizer
        if isinstance(quantizer, WeightQuantizer):
            weight, scale, zero_point = self._weight(path, layer, quantizer.qparams)
            axis = quantizer.qparams.axis or 0
            dequantized = self._emit(
                OPS.dequantize_weight.default,
                (weight, scale, zero_point, axis),
                None,
                f"{self.current.name}_weight_float",
            )
        else:
            dequantized = self._constant(f"{path}.weight", layer.weight)
        bias = None if layer.bias is None else self._constant(f"{path}.float_bias", layer.bias)
        form = functional_form(layer)
        assert form is not None

        def constant(name: str) -> fx.Node | None:
            return dequantized if name == "weight" else bias

        def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
            created = self.graph.create_node("call_function", target, args, kwargs)
            return self._annotate(created, None)

        y = form(layer, constant, call, (x,), {})
        if residual:
            y = call(torch.add, (y, residual[0]), {})
        return self._activate(y, module.activation)

    def _activate(self, y: fx.Node, activation: str) -> fx.Node:
        functions: dict[str, Any] = {"relu": F.relu, "relu6": F.relu6}
        if activation == "none":
            return y
        return self._emit(functions[activation], (y,), None, f"{self.current.name}_{activation}")

    # -- integer layers ------------------------------------------------------------------

    def _weight(
        self, path: str, layer: Any, qparams: QParams, output_scale: Tensor | None = None
    ) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        weight = self._constant(f"{path}.weight", qparams.quantize(layer.weight.detach()))
        scale = self._constant(
            f"{path}.weight_scale", qparams.scale if output_scale is None else output_scale
        )
        zero_point = None
        if bool((qparams.zero_point != 0).any()):
            zero_point = self._constant(
                f"{path}.weight_zero_point", qparams.zero_point.to(torch.int32)
            )
        return weight, scale, zero_point

    def layer(self, node: fx.Node, output: tuple[Any, ...], grid: Grid | None) -> fx.Node:
        """A convolution or linear layer whose integer result is written as `output` says."""
        path = str(node.target)
        module = self.source.get_submodule(path)
        assert isinstance(module, FusedLayer)
        quantizer = module.weight_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        layer: Any = module.layer
        x, *residual = (self.integers[source] for source in node.args)  # type: ignore[index]
        qparams = _room_for_bias(quantizer.qparams, layer.bias, x.grid.scale)
        # A scale a channel is folded into the weights' scales on both sides of the value.
        per_channel = qparams.scale
        if x.channels is not None:
            repeats = layer.out_channels // layer.in_channels
            per_channel = per_channel * (x.channels / x.grid.scale).repeat_interleave(repeats)
        rescaled = per_channel
        if self.output_channels is not None and grid is not None:
            rescaled = per_channel * (grid.scale / self.output_channels)
        weight, scale, zero_point = self._weight(path, layer, qparams, rescaled)
        bias = None
        if layer.bias is not None:
            step = x.grid.scale * per_channel.double()
            rounded = (layer.bias.detach().double() / step).round()
            bias = self._constant(f"{path}.bias", rounded.to(torch.int32))
        extra = tuple(item for value in residual for item in (value.node, *value.grid.input))
        if isinstance(layer, nn.Linear):
            args = (x.node, *x.grid.input, weight, scale, zero_point, bias, *output, *extra)
            return self._emit(OPS.linear.default, args, grid)
        geometry = (
            list(layer.stride),
            _padding(layer),
            list(layer.dilation),
            layer.groups,
        )
        common = (x.node, *x.grid.input, weight, scale, zero_point, bias, *geometry)
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            args = (*common, list(layer.output_padding), *output, *extra)
            return self._emit(OPS.conv_transpose.default, args, grid)
        return self._emit(OPS.conv.default, (*common, *output, *extra), grid)

    def _layer_in_float_out(self, node: fx.Node) -> fx.Node:
        activation = _activation(self.source, node)
        y = self.layer(node, (1.0, 0, 0, 0, torch.float32), None)
        return self._activate(y, activation)


def _room_for_bias(qparams: QParams, bias: Tensor | None, x_scale: float) -> QParams:
    """Weight scales under which the bias fits into half of an int32.

    A channel whose weights are next to nothing has a scale so small that its bias would leave
    the accumulator; a coarser scale costs it less than 2^-22 of its output.
    """
    if bias is None:
        return qparams
    smallest = (bias.detach().double().abs() / (x_scale * 2.0**30)).float()
    if qparams.scale.numel() == 1:
        smallest = smallest.amax().reshape(1)
    return replace(qparams, scale=torch.maximum(qparams.scale, smallest))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _activation(root: nn.Module, node: fx.Node) -> str:
    module = root.get_submodule(str(node.target))
    return module.activation if isinstance(module, FusedLayer) else "none"


def _makes_tensors(node: fx.Node) -> bool:
    return node.op == "call_module"


def _padding(layer: Any) -> list[int]:
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size)
    if layer.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return list(layer.padding)


def _emit_layer(conversion: _Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    activation = _activation(conversion.source, node)
    low = grid.zero_point if activation in ("relu", "relu6") else None
    high = grid.code(6.0) if activation == "relu6" else None
    return conversion.layer(node, grid.output(low, high), grid)


def _emit_affine(conversion: _Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    path = str(node.target)
    norm: Any = conversion.source.get_submodule(path)
    x = conversion.integers[node.all_input_nodes[0]]
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    gamma = norm.weight.double() if norm.weight is not None else torch.ones_like(deviation)
    beta = norm.bias.double() if norm.bias is not None else torch.zeros_like(deviation)
    weight = (gamma / deviation).detach()
    bias = (beta - norm.running_mean.double() * weight).detach()
    return conversion._emit(
        OPS.channel_affine.default,
        (
            x.node,
            *x.grid.input,
            conversion._constant(f"{path}.channel_weight", weight.float()),
            conversion._constant(f"{path}.channel_bias", bias.float()),
            *grid.output(),
        ),
        grid,
    )


def _emit_pair(conversion: _Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    a, b = (conversion.integers[cast(fx.Node, operand)] for operand in node.args)
    target = OPS.mul.default if node.target is torch.mul else OPS.add.default
    low = grid.zero_point if node.target is add_relu else None
    return conversion._emit(
        target, (a.node, *a.grid.input, b.node, *b.grid.input, *grid.output(low)), grid
    )


def _emit_table(conversion: _Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    x = conversion.integers[node.all_input_nodes[0]]
    name, function = table_function(node)
    if x.grid.dtype != torch.uint8 or grid.dtype != torch.uint8:
        # 65,536 entries are no table: the function is computed in float inside the operation.
        floats = conversion._emit(OPS.dequantize.default, (x.node, *x.grid.input), None)
        conversion.floats[node.all_input_nodes[0]] = floats
        args = fx.map_arg(node.args, conversion._float_or_plain)
        result = conversion.graph.create_node("call_function", node.target, args, dict(node.kwargs))
        conversion._annotate(result, None)
        return conversion._emit(OPS.quantize.default, (result, *grid.output()), grid)
    table = build_table(function, *x.grid.input, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    constant = conversion._constant(f"tables.{node.name}", table)
    emitted = conversion._emit(OPS.lookup.default, (x.node, constant), grid)
    emitted.meta["function"] = name
    return emitted


def _emit_pool(conversion: _Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    x = conversion.integers[cast(fx.Node, node.args[0])]
    kwargs = dict(fx.map_arg(node.kwargs, conversion._movable))
    head = (x.node, *x.grid.input)
    target: Any = node.target
    if target is torch.mean:
        dims = kwargs["dim"]
        dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
        keepdim = bool(kwargs.get("keepdim", False))
        return conversion._emit(OPS.mean.default, (*head, dims, keepdim, *grid.output()), grid)
    dimensions = int(target.__name__[-2])
    if target.__name__.startswith("adaptive"):
        size = _expand(kwargs["output_size"], dimensions)
        return conversion._emit(OPS.adaptive_avg_pool.default, (*head, size, *grid.output()), grid)
    kernel = _expand(kwargs["kernel_size"], dimensions)
    stride = kwargs.get("stride")
    args = (
        *head,
        kernel,
        kernel if stride in (None, ()) else _expand(stride, dimensions),
        _expand(kwargs.get("padding", 0), dimensions),
        bool(kwargs.get("ceil_mode", False)),
        bool(kwargs.get("count_include_pad", True)),
        kwargs.get("divisor_override"),
        *grid.output(),
    )
    return conversion._emit(OPS.avg_pool.default, args, grid)


def _expand(value: Any, dimensions: int) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return list(value) if len(value) == dimensions else list(value) * dimensions
    return [value] * dimensions


_EMITTERS: dict[Kind, Callable[[_Conversion, fx.Node, Grid], fx.Node]] = {
    Kind.LAYER: _emit_layer,
    Kind.AFFINE: _emit_affine,
    Kind.PAIR: _emit_pair,
    Kind.TABLE: _emit_table,
    Kind.POOL: _emit_pool,
}
