"""Which calls torch can trace: those whose arguments are tensors and constants, and whose result
depends on the batch size in nothing but its shape.

A kernel of ours declares it where it is defined; of torch's functions there is a table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx

from passes import softmax_numerators

__all__ = ["traceable", "traced", "traced_as"]

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

_TRACED_AS: dict[Any, Any] = {
    function: function
    for function in (
        torch.quantize_per_tensor,
        torch.clamp,
        torch.clone,
        torch.flatten,
        torch.cat,
        torch.channel_shuffle,
        F.max_pool2d,
        F.avg_pool2d,
        F.adaptive_avg_pool2d,
        F.layer_norm,
        F.softmax,
        F.gelu,
        torch.add,
        torch.mul,
        torch.reshape,
        torch.permute,
        torch.transpose,
        torch.roll,
        operator.getitem,
        softmax_numerators,
    )
}
_METHODS = ("dequantize", "to")
_NAMESPACES = ("quantized", "aten")


def traceable(kernel: _Kernel) -> _Kernel:
    """Declare that a kernel can be traced as it is."""
    return traced_as(kernel)(kernel)


def traced_as(call: Any) -> Callable[[_Kernel], _Kernel]:
    """Declare that a trace holds `call` in place of a kernel, for the same values."""

    def declare(kernel: _Kernel) -> _Kernel:
        _TRACED_AS[kernel] = call
        return kernel

    return declare


def traced(node: fx.Node) -> Any:
    """What a trace calls for `node`; None where torch cannot trace it."""
    if node.op == "call_method":
        return node.target if node.target in _METHODS else None
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target in _TRACED_AS:
        return _TRACED_AS[target]
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return target
    return None
