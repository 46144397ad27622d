"""Why a call of an operation stays float: one function for what a kind of call cannot be.

Each takes the node, and the module that it calls or None, and returns the reason, or "" where
there is none. Those called ``…_alone`` speak of integers alone (``requantization = "dyadic"``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from passes import tensor_info

# ruff: noqa: D103

_ALONE = "has no form on integers alone"


def nothing(node: fx.Node, module: Any) -> str:
    return ""


def always(what: str) -> Callable[[fx.Node, Any], str]:
    """Refuse every call on integers alone; `what` names the operation."""
    return lambda node, module: f"{what} {_ALONE}"


def linear(node: fx.Node, module: Any) -> str:
    info = tensor_info(node.all_input_nodes[0]) if node.all_input_nodes else None
    vector = info is not None and len(info.shape) < 2
    return "a vector without a batch dimension has no integer form: give batches" if vector else ""


def convolution(node: fx.Node, module: Any) -> str:
    info = tensor_info(node.all_input_nodes[0]) if node.all_input_nodes else None
    if info is not None and len(info.shape) < module.weight.dim():
        return "an image without a batch dimension has no integer form: give batches"
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r} has no integer form"
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(value % 2 for value in total):
            return "padding 'same' is asymmetric here"
    return ""


def transposed(node: fx.Node, module: Any) -> str:
    if node.kwargs.get("output_size") is not None:
        return "an output size that the call gives has no integer form"
    return convolution(node, module)


def batch_norm(node: fx.Node, module: Any) -> str:
    return "batch norm without running statistics" if module.running_mean is None else ""


def several_tensors(node: fx.Node, module: Any) -> str:
    name = getattr(node.target, "__name__", "it")
    return f"{name} takes more than one tensor" if len(node.all_input_nodes) > 1 else ""


def pair(node: fx.Node, module: Any) -> str:
    if node.kwargs.get("alpha", 1) != 1:
        return "an addition with alpha other than 1 has no integer form"
    if any(not isinstance(a, fx.Node) or a.meta.get("tensor") is None for a in node.args):
        return "the other operand is a number, known when the model runs"
    return ""


def matmul(node: fx.Node, module: Any) -> str:
    ranks = [len(info.shape) for a in node.args if (info := tensor_info(a)) is not None]
    matrices = len(ranks) == 2 and min(ranks) > 1
    return "" if matrices else "a product with a vector has no integer form"


def softmax(node: fx.Node, module: Any) -> str:
    info = tensor_info(node)
    dim = node.kwargs.get("dim")
    last = info is not None and dim in (-1, len(info.shape) - 1)
    return "" if last else f"softmax over dimension {dim} has no integer form, only over the last"


def normalize(node: fx.Node, module: Any) -> str:
    p = node.kwargs.get("p", 2)
    return "" if p == 2 else f"division by the {p}-norm has no integer form, only by the 2-norm"


def mean(node: fx.Node, module: Any) -> str:
    return "" if node.kwargs.get("dim") is not None else "mean over everything yields a scalar"


def indices(node: fx.Node, module: Any) -> str:
    return "pooling with indices" if node.kwargs.get("return_indices") else ""


def pad(node: fx.Node, module: Any) -> str:
    mode, value = node.kwargs.get("mode", "constant"), node.kwargs.get("value") or 0
    return "" if mode != "constant" or value == 0 else f"padding with {value} has no integer form"


def interpolate(node: fx.Node, module: Any) -> str:
    mode = node.kwargs.get("mode", "nearest")
    if mode == "nearest":
        return ""
    return f"{mode} interpolation has no integer form: its values pass through float32 and back"


_PASSES = "no multiply-accumulates stay float with it, its values pass through float32 and back"


def division(node: fx.Node, module: Any) -> str:
    return f"a divisor that the model computes has no integer form: {_PASSES}"


def difference(node: fx.Node, module: Any) -> str:
    return f"a difference to a mean has no integer form: {_PASSES}"


def slopes(node: fx.Node, module: Any) -> str:
    return f"a PReLU with a slope a channel has an integer form in 2 to 5 dimensions: {_PASSES}"


def statistics(node: fx.Node, module: Any) -> str:
    name = type(module).__name__
    return f"{name} normalizes by statistics of its input and has no integer form: {_PASSES}"


def adaptive(node: fx.Node, module: Any) -> str:
    open_size = None in _tuple(node.kwargs["output_size"])
    return "an output size of None has no integer form" if open_size else ""


def adaptive_alone(node: fx.Node, module: Any) -> str:
    one = all(value == 1 for value in _tuple(node.kwargs["output_size"]))
    return "" if one else f"an average over windows of several sizes {_ALONE}"


def average_alone(node: fx.Node, module: Any) -> str:
    kwargs = node.kwargs
    window = [*_tuple(kwargs["kernel_size"]), *_tuple(kwargs.get("stride"))]
    padding = _tuple(kwargs.get("padding", 0))
    if any(isinstance(value, fx.Node) for value in (*window, *padding)):
        return f"an average over windows whose size is known when the model runs {_ALONE}"
    if kwargs.get("ceil_mode"):
        return f"an average over windows with ceil_mode {_ALONE}"
    if kwargs.get("divisor_override") is not None:
        return f"an average with divisor_override {_ALONE}"
    if not kwargs.get("count_include_pad", True) and any(padding):
        return f"an average that leaves out its padding {_ALONE}"
    return ""


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
