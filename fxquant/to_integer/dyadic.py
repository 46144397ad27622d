"""Everything on integers alone: exact accumulators, then multiplication by f / 2^e and rounding.

No scale is left in the graph, and no float tensor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxquant.errors import CompileError
from fxquant.integer import dyadic, dyadic_tensors
from fxquant.plan.operations import Kind
from fxquant.to_integer.conversion import OPS, Conversion, Integers
from fxquant.to_integer.grid import Grid
from fxquant.to_integer.layers import geometry, layer_integers, output_bounds
from fxquant.to_integer.operations import Emit, emit_table
from passes import add_relu, tensor_info

__all__ = ["DYADIC_EMITTERS", "rescale"]


def rescale(
    conversion: Conversion,
    accumulators: fx.Node,
    scale: Tensor,
    grid: Grid,
    *,
    axis: int,
    bounds: tuple[int, int] | None = None,
) -> fx.Node:
    """Integers of value ``scale · a`` onto `grid`; `scale` is float64 [1], or [C] along `axis`."""
    multiplier, shift = dyadic_tensors(scale.double() / grid.scale)
    path = f"rescale.{conversion.current.name}"
    low, high = bounds or (grid.qmin, grid.qmax)
    args = (
        accumulators,
        0,
        conversion.constant(f"{path}.multiplier", multiplier),
        conversion.constant(f"{path}.shift", shift),
        axis,
        grid.zero_point,
        low,
        high,
        grid.dtype,
    )
    return conversion.emit(OPS.rescale.default, args, grid)


def _accumulate(conversion: Conversion, operator: Any, *args: Any) -> fx.Node:
    return conversion.emit(operator, args, None, f"{conversion.current.name}_accumulators")


def _layer(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    found = layer_integers(conversion, node, grid)
    layer, x = found.layer, found.x
    operands = (x.node, x.grid.zero_point, found.weight, found.zero_point, found.bias)
    if isinstance(layer, nn.Linear):
        sums = _accumulate(conversion, OPS.linear_accumulate.default, *operands)
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sums = _accumulate(conversion, OPS.conv_accumulate.default, *operands, *geometry(layer))
    else:
        raise _no_form(node, type(layer).__name__)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    bounds = output_bounds(conversion, node, grid)
    scale = found.scale.double() * x.grid.scale
    return rescale(conversion, sums, scale, grid, axis=axis, bounds=bounds)


def _matmul(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    a, b = _operands(conversion, node)
    operands = (a.node, a.grid.zero_point, b.node, b.grid.zero_point)
    sums = _accumulate(conversion, OPS.matmul_accumulate.default, *operands)
    factor = float(node.kwargs.get("scale", 1.0))  # type: ignore[arg-type]
    return rescale(conversion, sums, _one(a.grid.scale * b.grid.scale * factor), grid, axis=-1)


def _pair(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    a, b = _operands(conversion, node)
    low = max(grid.qmin, grid.zero_point) if node.target is add_relu else grid.qmin
    if node.target is torch.mul:
        operands = (a.node, a.grid.zero_point, b.node, b.grid.zero_point)
        products = _accumulate(conversion, OPS.mul_accumulate.default, *operands)
        return rescale(conversion, products, _one(a.grid.scale * b.grid.scale), grid, axis=-1)
    branches = [
        (value.node, value.grid.zero_point, *dyadic(value.grid.scale / grid.scale))
        for value in (a, b)
    ]
    output = (grid.zero_point, low, grid.qmax, grid.dtype)
    return conversion.emit(OPS.add_rescaled.default, (*branches[0], *branches[1], *output), grid)


def _pool(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    x = conversion.integers[cast(fx.Node, node.args[0])]
    info = tensor_info(node.args[0])
    assert info is not None
    target: Any = node.target
    kwargs = node.kwargs
    if target is torch.mean:
        dims = kwargs["dim"]
        dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
        keepdim = bool(kwargs.get("keepdim", False))
    elif target.__name__.startswith("adaptive") and _is_one(kwargs["output_size"]):
        dims, keepdim = list(range(-int(target.__name__[-2]), 0)), True
    else:
        return _average_windows(conversion, node, grid, x, info.shape[1])
    count = 1
    for dim in dims:
        count *= info.shape[dim]  # type: ignore[index]
    sums = _accumulate(
        conversion, OPS.sum_accumulate.default, x.node, x.grid.zero_point, dims, keepdim
    )
    return rescale(conversion, sums, _one(x.grid.scale / count), grid, axis=-1)


def _average_windows(
    conversion: Conversion, node: fx.Node, grid: Grid, x: Integers, channels: int
) -> fx.Node:
    """An average over windows is a depthwise convolution with ones."""
    target: Any = node.target
    kwargs: dict[str, Any] = dict(node.kwargs)
    padded = any(_tuple(kwargs.get("padding", 0)))
    plain = (
        not target.__name__.startswith("adaptive")
        and not kwargs.get("ceil_mode")
        and kwargs.get("divisor_override") is None
        and (kwargs.get("count_include_pad", True) or not padded)
    )
    if not plain:
        raise _no_form(node, target.__name__)
    dimensions = int(target.__name__[-2])
    kernel = _tuple(kwargs["kernel_size"], dimensions)
    ones = torch.ones(channels, 1, *kernel, dtype=torch.int8)
    weight = conversion.constant(f"rescale.{node.name}.ones", ones)
    stride = _tuple(kwargs.get("stride") or kernel, dimensions)
    padding = _tuple(kwargs.get("padding", 0), dimensions)
    args = (list(stride), list(padding), [1] * dimensions, channels)
    sums = _accumulate(
        conversion,
        OPS.conv_accumulate.default,
        *(x.node, x.grid.zero_point, weight, None, None),
        *args,
    )
    return rescale(conversion, sums, _one(x.grid.scale / ones[0].numel()), grid, axis=1)


def _affine(conversion: Conversion, node: fx.Node, grid: Grid) -> fx.Node:
    raise _no_form(node, "a batch norm by itself")


def _operands(conversion: Conversion, node: fx.Node) -> list[Integers]:
    return [conversion.integers[cast(fx.Node, operand)] for operand in node.args]


def _no_form(node: fx.Node, what: str) -> CompileError:
    return CompileError(
        f"{node.name}: {what} has no form on integers alone; compile with "
        'requantization = "float", or keep it in front of or behind the integers by start_at'
    )


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _is_one(size: Any) -> bool:
    return all(value == 1 for value in _tuple(size))


def _tuple(value: Any, length: int = 1) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * length


DYADIC_EMITTERS: dict[Kind, Emit] = {
    Kind.LAYER: _layer,
    Kind.AFFINE: _affine,
    Kind.PAIR: _pair,
    Kind.MATMUL: _matmul,
    Kind.TABLE: emit_table,
    Kind.POOL: _pool,
}
"""How each kind writes the integers of a grid with integers alone."""
