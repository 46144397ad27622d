"""The catalogue: which canonical operation has an integer form, and of which kind.

One row for each operation: its kind, and what says why a call has no integer form. Every later
stage reads the decision; none makes it again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.plan import refusals
from passes import FUSIBLE_LAYERS, FusedLayer, add_relu, is_plain, overrides_forward
from passes.attention.functions import (
    masked_softmax,
    scaled_matmul,
    softmax_numerators,
    weighted_mean,
)

__all__ = [
    "ADAPTIVE_AVERAGES",
    "AVERAGES",
    "OPERATIONS",
    "Kind",
    "Operation",
    "Row",
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
    POOL = "average"  # keeps the scale of values of one sign, rounds
    SELECT = "maximum or concatenation"  # keeps the one scale that its operands share
    MOVE = "data movement"  # keeps the scale and the integers
    SHAPE = "reads a shape"  # no tensor at all
    FLOAT = "float"


@dataclass(frozen=True)
class Operation:
    """The kind of a node, and for Kind.FLOAT the reason why it has no integer form.

    `alone`: why it has none on integers alone, "" where it has one.
    """

    kind: Kind
    reason: str = ""
    alone: str = ""


Refusal = Callable[[fx.Node, Any], str]
"""Why a node, which calls a module or else None, is refused; "" where it is not."""


@dataclass(frozen=True)
class Row:
    """An operation of the catalogue.

    `refuse` says why a call has no integer form, `alone` why it has none with
    ``requantization = "dyadic"``, which is integers alone. `curved`: a smooth function.
    """

    kind: Kind
    refuse: Refusal = refusals.nothing
    alone: Refusal = refusals.nothing
    curved: bool = False


def _rows(operations: Iterable[Any], row: Row) -> dict[Any, Row]:
    return dict.fromkeys(operations, row)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
ADAPTIVE_AVERAGES = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_MOVEMENT = (
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.permute,
    torch.transpose,
    torch.unsqueeze,
    torch.squeeze,
    torch.chunk,
    torch.split,
    torch.roll,
    operator.getitem,
    torch.flip,
    F.channel_shuffle,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    "expand",
    "repeat",
)
_FUNCTIONS = (
    F.relu,
    F.relu6,
    F.hardtanh,
    F.leaky_relu,
    F.hardsigmoid,
    # Smooth, but the recipe's table of operations has a key for GELU alone.
    F.gelu,
    torch.clamp,
    torch.abs,
    torch.neg,
    torch.square,
    torch.exp,
    torch.sqrt,
)
_CURVED = (
    F.elu,
    F.selu,
    F.celu,
    F.silu,
    F.mish,
    F.softplus,
    F.hardswish,
    torch.sigmoid,
    torch.tanh,
)

OPERATIONS: dict[Any, Row] = {
    nn.Linear: Row(Kind.LAYER, refusals.linear),
    **_rows(_CONVOLUTIONS, Row(Kind.LAYER, refusals.convolution)),
    **_rows(
        _TRANSPOSED,
        Row(Kind.LAYER, refusals.transposed, refusals.always("a transposed convolution")),
    ),
    **_rows(
        _BATCH_NORMS,
        Row(Kind.AFFINE, refusals.batch_norm, refusals.always("a batch norm by itself")),
    ),
    nn.LayerNorm: Row(Kind.NORM),
    torch.add: Row(Kind.PAIR, refusals.pair),
    torch.mul: Row(Kind.PAIR, refusals.pair),
    add_relu: Row(Kind.PAIR, refusals.pair),
    torch.matmul: Row(Kind.MATMUL, refusals.matmul),
    scaled_matmul: Row(Kind.MATMUL, refusals.matmul),
    weighted_mean: Row(Kind.MATMUL, refusals.matmul, refusals.always("a mean by weights")),
    F.softmax: Row(Kind.SOFTMAX, refusals.softmax),
    masked_softmax: Row(Kind.SOFTMAX, refusals.softmax),
    softmax_numerators: Row(Kind.SOFTMAX),
    F.normalize: Row(Kind.NORMALIZE, refusals.normalize),
    **_rows(AVERAGES, Row(Kind.POOL, alone=refusals.average_alone)),
    **_rows(ADAPTIVE_AVERAGES, Row(Kind.POOL, refusals.adaptive, refusals.adaptive_alone)),
    torch.mean: Row(Kind.POOL, refusals.mean),
    **_rows((F.max_pool1d, F.max_pool2d, F.max_pool3d), Row(Kind.SELECT, refusals.indices)),
    torch.cat: Row(Kind.SELECT),
    torch.stack: Row(Kind.SELECT),
    **_rows(_MOVEMENT, Row(Kind.MOVE)),
    F.pad: Row(Kind.MOVE, refusals.pad),
    F.interpolate: Row(Kind.MOVE, refusals.interpolate),
    torch.div: Row(Kind.FLOAT, refusals.division),
    torch.sub: Row(Kind.FLOAT, refusals.difference),
    nn.PReLU: Row(Kind.FLOAT, refusals.slopes),
    nn.GroupNorm: Row(Kind.FLOAT, refusals.statistics),
    nn.InstanceNorm1d: Row(Kind.FLOAT, refusals.statistics),
    nn.InstanceNorm2d: Row(Kind.FLOAT, refusals.statistics),
    nn.InstanceNorm3d: Row(Kind.FLOAT, refusals.statistics),
    **_rows(_FUNCTIONS, Row(Kind.TABLE, refusals.several_tensors)),
    **_rows(_CURVED, Row(Kind.TABLE, refusals.several_tensors, curved=True)),
    **_rows(("size", "dim", "numel"), Row(Kind.SHAPE)),
}
"""By the function, by the method's name, or by the type of the module that a node calls."""

_SCALAR_ARITHMETIC = (torch.add, torch.sub, torch.mul, torch.div, torch.pow)


def layer_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The convolution or linear layer that `node` calls, unwrapped; None for anything else."""
    if node.op != "call_module":
        return None
    module = root.get_submodule(str(node.target))
    if isinstance(module, FusedLayer):
        return module.layer
    return module if is_plain(module, FUSIBLE_LAYERS) else None


def data_operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that `node` computes with: not sizes, and not the mask of a softmax."""
    masked = node.target in (masked_softmax, softmax_numerators)
    sources = node.all_input_nodes[:1] if masked else node.all_input_nodes
    return [source for source in sources if source.meta.get("tensor") is not None]


def is_curved(node: fx.Node) -> bool:
    """Whether a Kind.TABLE node is a smooth function, not one made of straight lines."""
    return node.target in OPERATIONS and OPERATIONS[node.target].curved


def classify(node: fx.Node, root: nn.Module) -> Operation:
    """The kind of `node` by its operation alone; recipes and operands come later."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Operation(Kind.FLOAT, "")
    module = None
    if node.op == "call_module":
        module = layer_of(node, root) or root.get_submodule(str(node.target))
        name = type(module).__name__
        if overrides_forward(module):
            return Operation(
                Kind.FLOAT, getattr(module, "why_float", "") or f"{name} is code of its own"
            )
        row = next((OPERATIONS[t] for t in type(module).__mro__ if t in OPERATIONS), None)
    else:
        name = str(getattr(node.target, "__name__", f"method {node.target}"))
        row = _function(node)
    if row is None:
        return Operation(Kind.FLOAT, f"{name} has no integer form")
    if refusal := row.refuse(node, module):
        return Operation(Kind.FLOAT, refusal)
    return Operation(row.kind, alone=row.alone(node, module))


def _function(node: fx.Node) -> Row | None:
    tensors = [source for source in node.all_input_nodes if source.meta.get("tensor") is not None]
    if node.op == "call_function" and node.meta.get("tensor") is None and not tensors:
        return Row(Kind.SHAPE)
    if node.target in _SCALAR_ARITHMETIC and len(tensors) == 1 and _only_scalars_beside(node):
        return Row(Kind.TABLE)
    return OPERATIONS.get(node.target)


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
