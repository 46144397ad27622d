"""A `torch.ops.fxquant.conv` call of an integer graph as a record: read, changed, written back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.x86.saturation import kernels_saturate, pair_sums_fit
from fxquant.integer.bounds import largest_bias
from fxquant.kernels.calls import operator_arguments
from fxquant.meta import NODE_KEYS
from fxquant.to_integer import Grid
from passes import Rewriter, TensorInfo, tensor_info
from passes.infra.meta import copy_meta
from passes.infra.stored import get_tensor

__all__ = ["Convolution", "clamp_range"]

CONV: Any = torch.ops.fxquant.conv.default
_KEEP_RANGE: tuple[Any, ...] = (
    torch.chunk,
    torch.split,
    torch.cat,
    torch.channel_shuffle,
    torch.ops.fxquant.max_pool.default,
)


@dataclass(frozen=True, eq=False)
class Convolution:
    """The arguments of one call by the names of the operator's schema, tensors read.

    `weight_scale` may be float64: its product with the other scales is what is rounded to
    float32, so that a multiplier can be kept to the last bit when the scales around it change.
    """

    x: fx.Node
    x_scale: float
    x_zero_point: int
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: torch.dtype
    residual: fx.Node | None = None
    residual_scale: float = 1.0
    residual_zero_point: int = 0

    @classmethod
    def read(cls, node: fx.Node) -> Convolution | None:
        """The record of `node`, or None where it is no convolution of integers to integers."""
        if node.target is not CONV or "grid" not in node.meta:
            return None
        root = node.graph.owning_module
        assert root is not None
        values = operator_arguments(node)
        for name in ("weight", "weight_scale", "weight_zero_point", "bias"):
            if values[name] is not None:
                values[name] = get_tensor(root, str(values[name].target))
        for name in ("stride", "padding", "dilation"):
            values[name] = tuple(values[name])
        return cls(**values)

    @property
    def channels(self) -> int:
        """Of the output."""
        return int(self.weight.shape[0])

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """One number for each spatial dimension."""
        return tuple(self.weight.shape[2:])

    @property
    def depthwise(self) -> bool:
        """One input channel for each output channel."""
        return self.groups > 1 and self.groups == self.channels and self.weight.shape[1] == 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What convolutions must have in common to run as one."""
        return (self.kernel_size, self.stride, self.padding, self.dilation, self.depthwise)

    @property
    def scales(self) -> Tensor:
        """The weight scale of every output channel in float64: [O]."""
        return self.weight_scale.double().flatten().expand(self.channels)

    def refusal(self) -> str | None:
        """Why no kernel may run this: an accumulator or a pair of products could overflow."""
        if self.bias is not None:
            grid: Grid = self.x.meta["grid"]
            limit = largest_bias(self.weight, self.weight_zero_point, grid.dtype, self.x_zero_point)
            if bool((self.bias.abs() > limit).any()):
                return "an accumulator could leave int32"
        if kernels_saturate() and not pair_sums_fit(self.weight):
            return "without VNNI, neighbouring channels could saturate"
        return None

    def write(
        self, rewriter: Rewriter, place: fx.Node, like: fx.Node, grid: Grid, name: str | None = None
    ) -> fx.Node:
        """The call as a node in front of `place`, or instead of it where there is no `name`.

        It stands for `like`, and its constants are stored under its name.
        """
        path = name or place.name
        with rewriter.before(place):
            values = [self._argument(rewriter, like, path, field.name) for field in fields(self)]
            if self.residual is None:
                values = values[:-3]
            if name is not None:
                node = rewriter.call_function(
                    CONV, tuple(values), like=like, name=name, same_value=False
                )
        if name is None:
            node = rewriter.replace_call(place, CONV, tuple(values), sources=[like])
        info = tensor_info(like)
        if info is not None:
            shape = (info.shape[0], self.channels, *info.shape[2:])
            node.meta["tensor"] = TensorInfo(shape, info.dtype)
        stood_for = place if name is None else like
        if tensor_info(stood_for) == tensor_info(node):
            copy_meta(stood_for, node, "integers", table=NODE_KEYS)
        node.meta["grid"] = grid
        return node

    def _argument(self, rewriter: Rewriter, like: fx.Node, path: str, name: str) -> Any:
        value = getattr(self, name)
        if isinstance(value, Tensor):
            return rewriter.get_attr(f"rewritten.{path}.{name}", value, like=like)
        return list(value) if isinstance(value, tuple) else value


def clamp_range(node: fx.Node) -> tuple[int, int]:
    """The least and the largest code that an integer value can hold."""
    if node.target is CONV or hasattr(node.target, "_schema"):
        values = operator_arguments(node)
        if "qmin" in values:
            return int(values["qmin"]), int(values["qmax"])
    grid: Grid = node.meta["grid"]
    sources = [source for source in node.all_input_nodes if "grid" in source.meta]
    is_item = getattr(node.target, "__name__", "") == "getitem"
    if not sources or not (is_item or node.target in _KEEP_RANGE):
        return grid.qmin, grid.qmax
    ranges = [clamp_range(source) for source in sources]
    return min(low for low, _ in ranges), max(high for _, high in ranges)
