"""The catalogue: which canonical operation has an integer form, and of which kind."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import FUSIBLE_LAYERS, FusedLayer, add_relu, tensor_info
from passes.attention.functions import (
    masked_softmax,
    scaled_matmul,
    softmax_numerators,
    weighted_mean,
)

__all__ = [
    "BATCH_NORMS",
    "Kind",
    "Operation",
    "classify",
    "data_operands",
    "is_curved",
    "layer_of",
    "table_function",
]


class Kind(Enum):
    """How an operation treats the scales of its operands and of its result."""

    LAYER = "convolution or linear"  # its own output scale; a weight
    AFFINE = "batch norm by itself"  # its own output scale; float constants a channel
    PAIR = "addition or product of two values"  # its own output scale
    MATMUL = "product of two activations"  # its own output scale
    SOFTMAX = "softmax"  # its own output scale, or the one that its integer form fixes
    NORM = "layer norm"  # its own output scale
    NORMALIZE = "division by the norm"  # its own output scale
    TABLE = "function of one 8-bit value"  # its own output scale; 256 entries
    POOL = "average"  # keeps the scale, rounds
    SELECT = "maximum or concatenation"  # keeps the one scale that its operands share
    MOVE = "data movement"  # keeps the scale and the integers
    SHAPE = "reads a shape"  # no tensor at all
    FLOAT = "float"


@dataclass(frozen=True)
class Operation:
    """The kind of a node, and for Kind.FLOAT the reason why it has no integer form."""

    kind: Kind
    reason: str = ""


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_KINDS: dict[Any, Kind] = {
    torch.add: Kind.PAIR,
    torch.mul: Kind.PAIR,
    add_relu: Kind.PAIR,
    torch.matmul: Kind.MATMUL,
    scaled_matmul: Kind.MATMUL,
    weighted_mean: Kind.MATMUL,
    F.softmax: Kind.SOFTMAX,
    masked_softmax: Kind.SOFTMAX,
    softmax_numerators: Kind.SOFTMAX,
    F.normalize: Kind.NORMALIZE,
    F.avg_pool1d: Kind.POOL,
    F.avg_pool2d: Kind.POOL,
    F.avg_pool3d: Kind.POOL,
    F.adaptive_avg_pool1d: Kind.POOL,
    F.adaptive_avg_pool2d: Kind.POOL,
    F.adaptive_avg_pool3d: Kind.POOL,
    torch.mean: Kind.POOL,
    F.max_pool1d: Kind.SELECT,
    F.max_pool2d: Kind.SELECT,
    F.max_pool3d: Kind.SELECT,
    torch.cat: Kind.SELECT,
    torch.stack: Kind.SELECT,
    torch.reshape: Kind.MOVE,
    torch.flatten: Kind.MOVE,
    torch.unflatten: Kind.MOVE,
    torch.permute: Kind.MOVE,
    torch.transpose: Kind.MOVE,
    torch.unsqueeze: Kind.MOVE,
    torch.squeeze: Kind.MOVE,
    torch.chunk: Kind.MOVE,
    torch.split: Kind.MOVE,
    operator.getitem: Kind.MOVE,
    F.pad: Kind.MOVE,
    F.channel_shuffle: Kind.MOVE,
    F.interpolate: Kind.MOVE,
    torch.roll: Kind.MOVE,
}

_TABLES: dict[Any, str] = {
    F.relu: "relu",
    F.relu6: "relu6",
    F.hardtanh: "hardtanh",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    F.selu: "selu",
    F.celu: "celu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.mish: "mish",
    F.softplus: "softplus",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    torch.clamp: "clamp",
    torch.abs: "abs",
    torch.neg: "neg",
    torch.square: "square",
    torch.exp: "exp",
    torch.sqrt: "sqrt",
}
_CURVED = frozenset(
    ("elu", "selu", "celu", "silu", "mish", "softplus", "hardswish", "sigmoid", "tanh")
)
_SCALAR_ARITHMETIC: dict[Any, str] = {
    torch.add: "add",
    torch.sub: "sub",
    torch.mul: "mul",
    torch.div: "div",
    torch.pow: "pow",
}


def layer_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The convolution or linear layer that `node` calls, unwrapped; None for anything else."""
    if node.op != "call_module":
        return None
    module = root.get_submodule(str(node.target))
    if isinstance(module, FusedLayer):
        return module.layer
    return module if isinstance(module, FUSIBLE_LAYERS) else None


def data_operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that `node` computes with: not sizes, and not the mask of a softmax."""
    masked = node.target in (masked_softmax, softmax_numerators)
    sources = node.all_input_nodes[:1] if masked else node.all_input_nodes
    return [source for source in sources if source.meta.get("tensor") is not None]


def is_curved(node: fx.Node) -> bool:
    """Whether a Kind.TABLE node is a smooth function, not one made of straight lines."""
    return _TABLES.get(node.target) in _CURVED


def classify(node: fx.Node, root: nn.Module) -> Operation:
    """The kind of `node` by its operation alone; recipes and operands come later."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Operation(Kind.FLOAT, "")
    if node.op == "call_method":
        if node.target in ("size", "dim", "numel"):
            return Operation(Kind.SHAPE)
        if node.target == "expand":
            return Operation(Kind.MOVE)
        return Operation(Kind.FLOAT, f"method {node.target} has no integer form")
    if node.op == "call_module":
        if layer_of(node, root) is not None:
            return _layer(node, root)
        module = root.get_submodule(str(node.target))
        if isinstance(module, BATCH_NORMS):
            if module.running_mean is None:
                return Operation(Kind.FLOAT, "batch norm without running statistics")
            return Operation(Kind.AFFINE)
        if isinstance(module, nn.LayerNorm):
            return Operation(Kind.NORM)
        return Operation(Kind.FLOAT, f"{type(module).__name__} has no integer form")
    return _function(node)


def _layer(node: fx.Node, root: nn.Module) -> Operation:
    layer: Any = layer_of(node, root)
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        return Operation(Kind.FLOAT, f"padding mode {mode!r} has no integer form")
    if isinstance(getattr(layer, "padding", ()), str) and layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(value % 2 for value in total):
            return Operation(Kind.FLOAT, "padding 'same' is asymmetric here")
    return Operation(Kind.LAYER)


def _function(node: fx.Node) -> Operation:
    name = getattr(node.target, "__name__", str(node.target))
    tensors = [source for source in node.all_input_nodes if source.meta.get("tensor") is not None]
    if node.meta.get("tensor") is None and not tensors:
        return Operation(Kind.SHAPE)
    if node.target in _SCALAR_ARITHMETIC and len(tensors) == 1 and _only_scalars_beside(node):
        return Operation(Kind.TABLE)
    if node.target in _TABLES:
        if len(node.all_input_nodes) > 1:
            return Operation(Kind.FLOAT, f"{name} takes more than one tensor")
        return Operation(Kind.TABLE)
    kind = _KINDS.get(node.target)
    if kind is None:
        return Operation(Kind.FLOAT, f"{name} has no integer form")
    refuse = _REFUSALS.get(node.target)
    refusal = refuse(node) if refuse is not None else ""
    return Operation(Kind.FLOAT, refusal) if refusal else Operation(kind)


def _only_scalars_beside(node: fx.Node) -> bool:
    operands = [*node.args, *node.kwargs.values()]
    return (
        all(
            isinstance(item, (int, float, str, type(None)))
            for item in operands
            if not isinstance(item, fx.Node)
        )
        and len(node.all_input_nodes) == 1
    )


def _refuse_pair(node: fx.Node) -> str:
    if node.kwargs.get("alpha", 1) != 1:
        return "an addition with alpha other than 1 has no integer form"
    if any(not isinstance(a, fx.Node) or a.meta.get("tensor") is None for a in node.args):
        return "the other operand is a number, known when the model runs"
    return ""


def _refuse_matmul(node: fx.Node) -> str:
    ranks = [len(info.shape) for a in node.args if (info := tensor_info(a)) is not None]
    matrices = len(ranks) == 2 and min(ranks) > 1
    return "" if matrices else "a product with a vector has no integer form"


def _refuse_softmax(node: fx.Node) -> str:
    info = tensor_info(node)
    dim = node.kwargs.get("dim")
    last = info is not None and dim in (-1, len(info.shape) - 1)
    return "" if last else f"softmax over dimension {dim} has no integer form, only over the last"


def _refuse_pad(node: fx.Node) -> str:
    mode, value = node.kwargs.get("mode", "constant"), node.kwargs.get("value") or 0
    return "" if mode == "constant" and value == 0 else f"padding with {mode} {value}"


def _refuse_interpolate(node: fx.Node) -> str:
    mode = node.kwargs.get("mode", "nearest")
    return "" if mode == "nearest" else f"{mode} interpolation has no integer form"


def _refuse_mean(node: fx.Node) -> str:
    return "" if node.kwargs.get("dim") is not None else "mean over everything yields a scalar"


def _refuse_indices(node: fx.Node) -> str:
    return "pooling with indices" if node.kwargs.get("return_indices") else ""


_REFUSALS: dict[Any, Callable[[fx.Node], str]] = {
    torch.add: _refuse_pair,
    torch.mul: _refuse_pair,
    add_relu: _refuse_pair,
    torch.matmul: _refuse_matmul,
    scaled_matmul: _refuse_matmul,
    weighted_mean: _refuse_matmul,
    F.softmax: _refuse_softmax,
    masked_softmax: _refuse_softmax,
    F.pad: _refuse_pad,
    F.interpolate: _refuse_interpolate,
    torch.mean: _refuse_mean,
    F.max_pool1d: _refuse_indices,
    F.max_pool2d: _refuse_indices,
    F.max_pool3d: _refuse_indices,
}


def table_function(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The float function of a Kind.TABLE node, its constants bound."""
    source = node.all_input_nodes[0]
    target: Any = node.target

    def function(x: Tensor) -> Tensor:
        args = tuple(x if argument is source else argument for argument in node.args)
        result = target(*args, **node.kwargs)
        assert isinstance(result, Tensor)
        return result

    return function
