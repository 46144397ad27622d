"""The integer graph interpreted once more, in float64 and with real values instead of codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["Float64Check"]


class Float64Check(fx.Interpreter):
    """Runs an integer graph and compares every operation with float64, given the same codes in.

    The operands of an operation are dequantized to float64, the operation is computed on real
    values, and its result is quantized with one exact division. `steps` holds the largest
    difference of each node's codes. At most one step is right: the semantics round a value of
    at most a few thousand steps with a few float32 operations, an error below 2^-22 of it, so
    that both results lie within a small part of one step of each other and can only fall on the
    two sides of one tie. What moves data must not differ at all.

    A float result is rounded three times to float32 (accumulator, step, product), 3 · 2^-24 of
    its value; `excess` is the largest error in units of that bound.
    """

    def __init__(self, graph_module: fx.GraphModule, simulated: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.simulated = {node.name: node for node in simulated.graph.nodes}
        self.steps: dict[str, int] = {}
        self.excess: dict[str, float] = {}
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n.name] = result
        grid = n.meta.get("grid")
        if grid is not None and isinstance(result, Tensor):
            real = self._real(n)
            codes = (real / grid.scale).round() + grid.zero_point
            low, high = self._bounds(n, grid)
            difference = (codes.clamp(low, high) - result).abs()
            self.steps[n.name] = int(difference.max()) if difference.numel() else 0
        elif self._operator(n) in _FLOAT_RESULTS:
            real = self._real(n)
            # Where products cancel, the float64 sum keeps a rest that the integers do not have.
            bound = 3 * 2.0**-24 * real.abs() + 1e-12 * float(real.abs().amax()) + 1e-30
            self.excess[n.name] = float(((real - result).abs() / bound).max())
        return result

    # -- one operation -----------------------------------------------------------------------

    def _operator(self, node: fx.Node) -> str:
        target = node.target
        is_ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "fxquant"
        return target._schema.name.removeprefix("fxquant::") if is_ours else ""

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        target: Any = node.target
        schema = target._schema.arguments
        arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        values = fx.map_arg(node.args, lambda source: self.values[source.name])
        return {**arguments, **dict(zip([a.name for a in schema], values, strict=False))}

    def _bounds(self, node: fx.Node, grid: Any) -> tuple[int, int]:
        if self._operator(node) in ("", "lookup", "max_pool"):
            return grid.qmin, grid.qmax
        arguments = self._arguments(node)
        assert arguments["scale"] == grid.scale
        assert arguments["zero_point"] == grid.zero_point
        return arguments["qmin"], arguments["qmax"]

    def _real(self, node: fx.Node) -> Tensor:
        name = self._operator(node)
        if not name:
            return self._moved(node)
        if name == "lookup":
            return self._table(node)
        if name == "max_pool":
            return self._max_pool(node)
        return _OPERATORS[name](self._arguments(node))

    def _moved(self, node: fx.Node) -> Tensor:
        """Data movement does to real values what it does to codes; the padding is 0.0."""

        def operand(source: fx.Node) -> Any:
            return self._dequantized(source, self.values[source.name])

        args, kwargs = fx.map_arg(node.args, operand), dict(fx.map_arg(node.kwargs, operand))
        if node.target is F.pad:
            kwargs["value"] = 0.0
        target: Any = node.target
        result = target(*args, **kwargs)
        assert isinstance(result, Tensor)
        return result

    def _dequantized(self, source: fx.Node, value: Any) -> Any:
        grid = source.meta.get("grid")
        if grid is None:
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self._dequantized(source, item) for item in value)
        return (value.double() - grid.zero_point) * grid.scale

    def _max_pool(self, node: fx.Node) -> Tensor:
        a = self._arguments(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        window = [a[key] for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
        pool = getattr(F, f"max_pool{len(a['kernel_size'])}d")
        result: Tensor = pool(self._dequantized(source, a["x"]), *window)
        return result

    def _table(self, node: fx.Node) -> Tensor:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        x = self._dequantized(source, self.values[source.name])
        function = self.simulated[node.meta["simulated"]]
        target: Any = function.target
        operand = function.all_input_nodes[0]
        args = [x if argument is operand else argument for argument in function.args]
        result = target(*args, **function.kwargs)
        assert isinstance(result, Tensor)
        return result


_FLOAT_RESULTS = ("conv", "conv_transpose", "linear", "dequantize", "dequantize_weight")
Arguments = Mapping[str, Any]


def _x(a: Arguments, name: str = "x") -> Tensor:
    scale, zero_point = a[f"{name}_scale"], a[f"{name}_zero_point"]
    return (a[name].double() - zero_point) * scale


def _along(values: Tensor, dims: int, axis: int) -> Tensor:
    return values.double().view([-1 if d == axis else 1 for d in range(dims)])


def _weight(a: Arguments, axis: int = 0) -> Tensor:
    weight = a["weight"].double()
    if a["weight_zero_point"] is not None:
        weight = weight - _along(a["weight_zero_point"], weight.dim(), axis)
    return weight * _along(a["weight_scale"], weight.dim(), axis)


def _bias(a: Arguments) -> Tensor | None:
    if a["bias"] is None:
        return None
    step: Tensor = a["weight_scale"].double() * a["x_scale"]
    return a["bias"].double() * step


def _plus_residual(a: Arguments, y: Tensor) -> Tensor:
    return y if a["residual"] is None else y + _x(a, "residual")


def _conv(a: Arguments) -> Tensor:
    function = getattr(F, f"conv{a['weight'].dim() - 2}d")
    y = function(_x(a), _weight(a), _bias(a), a["stride"], a["padding"], a["dilation"], a["groups"])
    return _plus_residual(a, y)


def _conv_transpose(a: Arguments) -> Tensor:
    # The scales belong to output channels, of which each group has its own.
    weight, groups = a["weight"].double(), a["groups"]
    inner = weight.shape[0] // groups
    parts = []
    for group in range(groups):
        part = weight[group * inner : (group + 1) * inner]
        outer = slice(group * part.shape[1], (group + 1) * part.shape[1])
        zero_point, scale = a["weight_zero_point"], a["weight_scale"]
        if zero_point is not None:
            part = part - _along(_part(zero_point, outer), part.dim(), 1)
        parts.append(part * _along(_part(scale, outer), part.dim(), 1))
    function = getattr(F, f"conv_transpose{weight.dim() - 2}d")
    y = function(
        _x(a), torch.cat(parts), _bias(a), a["stride"], a["padding"], a["output_padding"],
        groups, a["dilation"],
    )  # fmt: skip
    return _plus_residual(a, y)


def _part(values: Tensor, outer: slice) -> Tensor:
    return values if values.numel() == 1 else values[outer]


def _linear(a: Arguments) -> Tensor:
    return _plus_residual(a, F.linear(_x(a), _weight(a), _bias(a)))


def _channel_affine(a: Arguments) -> Tensor:
    x = _x(a)
    return x * _along(a["weight"], x.dim(), 1) + _along(a["bias"], x.dim(), 1)


def _pool(a: Arguments) -> Tensor:
    pool = getattr(F, f"avg_pool{len(a['kernel_size'])}d")
    window = (a["kernel_size"], a["stride"], a["padding"], a["ceil_mode"], a["count_include_pad"])
    extra = () if len(a["kernel_size"]) == 1 else (a["divisor_override"],)
    result: Tensor = pool(_x(a), *window, *extra)
    return result


def _adaptive(a: Arguments) -> Tensor:
    pool = getattr(F, f"adaptive_avg_pool{len(a['output_size'])}d")
    result: Tensor = pool(_x(a), a["output_size"])
    return result


_OPERATORS: dict[str, Callable[[Arguments], Tensor]] = {
    "quantize": lambda a: a["x"].double(),
    "dequantize": lambda a: (a["q"].double() - a["zero_point"]) * a["scale"],
    "dequantize_weight": lambda a: _weight(a, a["axis"]),
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "add": lambda a: _x(a, "a") + _x(a, "b"),
    "mul": lambda a: _x(a, "a") * _x(a, "b"),
    "channel_affine": _channel_affine,
    "avg_pool": _pool,
    "adaptive_avg_pool": _adaptive,
    "mean": lambda a: _x(a).mean(a["dim"], keepdim=a["keepdim"]),
}
