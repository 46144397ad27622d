"""Operations that change nothing in a model in eval mode."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.canonicalize import Canonicalize
from passes.infra.base import Pass, PassResult, tensor_info
from passes.infra.rewrite import Rewriter
from passes.infra.stored import is_plain, module_of, overrides_forward

__all__ = ["EliminateNoops"]

Rule = Callable[[fx.Node, Any], bool]
"""Whether the call, whose first operand is given too, returns that operand unchanged."""


class EliminateNoops(Pass):
    """Erase what provably gives back its first operand, and code that nothing reads.

        before                    after
        y = dropout(x)            return x
        z = y.contiguous()
        return z

    Dropout and stochastic depth of eval mode, identity, copies, conversions to the type that the
    value has, arithmetic with the neutral element, paddings by nothing, reshapes, transpositions
    and slices that keep everything in its place, and a ReLU of what a ReLU gave. A reshape has to
    keep the shape for every batch size, not only on the probe inputs.
    """

    exact = True
    after = (Canonicalize,)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        for node in list(rewriter.graph.nodes):
            source = _unchanged_operand(node)
            if source is not None:
                rewriter.replace(node, source)
        return PassResult(rewriter.finish())


def _unchanged_operand(node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0] if node.args else node.kwargs.get("input")
    module = module_of(node)
    if module is not None:
        dropout = is_plain(module, nn.modules.dropout._DropoutNd) and not module.training
        identity = type(module) is nn.Identity and not overrides_forward(module)
        return source if dropout or identity else None
    if node.op == "call_function" and node.target in (torch.cat,):
        # The tensors may be one value: what split gives.
        single = isinstance(source, (list, tuple)) and len(source) == 1
        return source[0] if single and isinstance(source[0], fx.Node) else None
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        rule = _FUNCTIONS.get(node.target) or _BY_NAME.get(name)
    elif node.op == "call_method":
        rule = _METHODS.get(str(node.target))
    else:
        return None
    return source if rule is not None and rule(node, source) else None


def _always(node: fx.Node, source: fx.Node) -> bool:
    return True


def _in_eval(node: fx.Node, source: fx.Node) -> bool:
    names = ("training", "train")
    given = [node.kwargs[name] for name in names if name in node.kwargs]
    # dropout(x, p, training, ...), and stochastic_depth(x, p, mode, training) as torchvision has it
    position = 2 if "dropout" in getattr(node.target, "__name__", "") else 3
    return [*given, *node.args[position : position + 1]] == [False]


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    found, was = tensor_info(node), tensor_info(source)
    if found is None or was is None or found.dtype != was.dtype:
        return False
    values = [*node.args[1:], *node.kwargs.values()]
    harmless = (torch.dtype, torch.memory_format, bool, fx.Node)
    return all(isinstance(value, harmless) or str(value) == "cpu" for value in values)


def _neutral(number: float) -> Rule:
    def unchanged(node: fx.Node, source: fx.Node) -> bool:
        if len(node.args) != 2 or node.kwargs or isinstance(node.args[1], bool):
            return False
        info = tensor_info(node)
        # An integer tensor plus 0.0 is a float tensor.
        same = info is not None and info == tensor_info(source)
        return same and isinstance(node.args[1], (int, float)) and node.args[1] == number

    return unchanged


def _pads_nothing(node: fx.Node, source: fx.Node) -> bool:
    pads = node.kwargs.get("pad")
    return isinstance(pads, (tuple, list)) and all(isinstance(p, int) and p == 0 for p in pads)


def _keeps_shape(node: fx.Node, source: fx.Node) -> bool:
    info, shape = tensor_info(source), node.kwargs.get("shape")
    if isinstance(shape, fx.Node):
        return shape.target == "size" and shape.args == (source,)
    if info is None or not isinstance(shape, (tuple, list)) or len(shape) != len(info.shape):
        return False

    def own_size(axis: int) -> bool:
        size = shape[axis]
        if not isinstance(size, fx.Node) or size.target != "size" or len(size.args) != 2:
            return False
        dim = size.args[1]
        return size.args[0] is source and isinstance(dim, int) and dim % len(shape) == axis

    # A batch size written as a number proves nothing.
    if not (shape[0] == -1 or own_size(0)):
        return False
    return all(
        own_size(axis) or shape[axis] in (-1, info.shape[axis]) for axis in range(1, len(shape))
    )


def _flattens_one(node: fx.Node, source: fx.Node) -> bool:
    info = tensor_info(source)
    start, end = node.kwargs.get("start_dim"), node.kwargs.get("end_dim")
    if info is None or not info.shape or not isinstance(start, int) or not isinstance(end, int):
        return False
    return start % len(info.shape) == end % len(info.shape)


def _permutes_nothing(node: fx.Node, source: fx.Node) -> bool:
    dims = node.kwargs.get("dims")
    return isinstance(dims, (tuple, list)) and list(dims) == list(range(len(dims)))


def _squeezes_nothing(node: fx.Node, source: fx.Node) -> bool:
    info, dim = tensor_info(source), node.kwargs.get("dim")
    if info is None or not isinstance(dim, int):
        return False
    axis = dim % len(info.shape)
    return axis != 0 and info.shape[axis] != 1


def _takes_all(node: fx.Node, source: fx.Node) -> bool:
    if tensor_info(source) is None:
        return False  # items of a list
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is Ellipsis or part == slice(None) for part in parts if part is not None) and (
        None not in parts
    )


def _window_of_one(node: fx.Node, source: fx.Node) -> bool:
    def each(name: str, number: int) -> bool:
        values = node.kwargs.get(name)
        return isinstance(values, tuple) and all(value == number for value in values)

    plain = not node.kwargs.get("return_indices") and node.kwargs.get("divisor_override") is None
    # A window of one has no room for padding: torch refuses it.
    return plain and each("kernel_size", 1) and each("stride", 1)


def _positive_already(node: fx.Node, source: fx.Node) -> bool:
    return source.op == "call_function" and source.target in (F.relu, F.relu6)


_FUNCTIONS: dict[Any, Rule] = {
    torch.clone: _always,
    torch.detach: _always,
    torch.add: _neutral(0),
    torch.sub: _neutral(0),
    torch.mul: _neutral(1),
    torch.div: _neutral(1),
    torch.pow: _neutral(1),
    F.pad: _pads_nothing,
    F.relu: _positive_already,
    torch.reshape: _keeps_shape,
    torch.flatten: _flattens_one,
    torch.permute: _permutes_nothing,
    torch.squeeze: _squeezes_nothing,
    operator.getitem: _takes_all,
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), _window_of_one),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _window_of_one),
}
_BY_NAME: dict[str, Rule] = dict.fromkeys(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("feature_alpha_dropout", "stochastic_depth"),
    ),
    _in_eval,
)
_METHODS: dict[str, Rule] = {
    **dict.fromkeys(("contiguous", "clone", "cpu", "detach", "requires_grad_"), _always),
    **dict.fromkeys(("to", "float", "double", "half", "type", "type_as"), _same_type),
}
