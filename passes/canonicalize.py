"""One spelling for each operation, whether written as module, function, method or operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.canonical.composites import (
    recognize_channel_shuffle,
    recognize_gates,
    recognize_normalize,
)
from passes.canonical.functional_layers import make_layer_modules
from passes.canonical.functionalize import functionalize
from passes.canonical.indexing import spell_indexing
from passes.canonical.module_forms import module_form
from passes.canonical.spellings import (
    ABSENT,
    FUNCTIONS,
    METHODS,
    REQUIRED,
    UNKNOWN_METHODS,
    Spelling,
)
from passes.canonical.values import is_number, is_size, is_tensor
from passes.infra.base import Pass, PassResult, tensor_info
from passes.infra.meta import copy_meta
from passes.infra.rewrite import Rewriter
from passes.infra.stored import module_of

__all__ = ["Canonicalize"]

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_OPERATORS = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.matmul}
)
_COMMUTES = frozenset({torch.add, torch.mul})


class Canonicalize(Pass):
    """Give every operation its one spelling.

        before                                       after
        x = self.relu(x)   (nn.ReLU(inplace=True))   x = F.relu(x, inplace=False)
        x = x.view(x.shape[0], -1)                   n = x.size(0)
                                                     x = torch.reshape(x, shape=(n, -1))
        x = F.conv2d(x, self.weight, self.bias)      x = self.conv2d(x)   (nn.Conv2d)
        x = x.clamp_(0, 6)                           x = F.relu6(x, inplace=False)

    Layers with parameters are modules, everything else is a function: tensors positional, all
    other parameters by their names, with their defaults. What was written in place is a new
    value that every later reader reads. A channel shuffle that the shapes prove is one operation,
    and so are SiLU, hard sigmoid and hard swish made from their parts. Dead code is erased.

    Raises PassError where a write in place cannot be expressed as a new value.
    """

    exact = True

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        functionalize(rewriter)
        for node in list(rewriter.graph.nodes):
            _name_shapes(rewriter, node)
        declines = make_layer_modules(rewriter)
        for node in list(rewriter.graph.nodes):
            call = _canonical_call(node)
            if call is not None:
                _rewrite(rewriter, node, *call)
        spell_indexing(rewriter)
        recognize_channel_shuffle(rewriter)
        recognize_gates(rewriter)
        recognize_normalize(rewriter)
        return PassResult(rewriter.finish(), declines)


def _rewrite(
    rewriter: Rewriter,
    node: fx.Node,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if node.target is function:
        # A dict compares without order, and a listing shows the order.
        if list(node.kwargs) != list(kwargs):
            rewriter.modified = True
            node.kwargs = {}
        rewriter.set_call(node, args, kwargs)
    else:
        rewriter.replace_call(node, function, args, kwargs)


def _name_shapes(rewriter: Rewriter, node: fx.Node) -> None:
    """``x.shape`` is ``x.size()``, and its items are ``x.size(dim)``; a rank is a number."""
    if node.target is getattr and node.op == "call_function":
        source, name = node.args
        if name == "shape" and isinstance(source, fx.Node):
            with rewriter.before(node):
                rewriter.replace(node, rewriter.call_method("size", (source,), like=node))
            return
        if name in ("T", "mT") and (info := tensor_info(source)) and len(info.shape) == 2:
            rewriter.replace_call(node, torch.transpose, (source,), {"dim0": 0, "dim1": 1})
            return
    is_rank = (node.target is getattr and node.args[1] == "ndim") or (
        node.op == "call_method" and node.target in ("dim", "ndimension")
    )
    info = tensor_info(node.args[0]) if is_rank else None
    if info is not None:
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda n: len(info.shape) if n is node else n)
            user.kwargs = fx.map_arg(user.kwargs, lambda n: len(info.shape) if n is node else n)
        rewriter.erase(node)
        return
    if node.target is operator.getitem and isinstance(node.args[1], int):
        size = node.args[0]
        if isinstance(size, fx.Node) and size.target == "size" and is_size(size):
            with rewriter.before(node):
                new = rewriter.call_method("size", (size.args[0], node.args[1]), like=node)
            rewriter.replace(node, new)
    elif node.target == "size" and node.op == "call_method" and node.kwargs:
        rewriter.set_call(node, (node.args[0], *node.kwargs.values()), {})


def _canonical_call(node: fx.Node) -> _Call | None:
    """The canonical form of a call, or None where it is not known to have one."""
    module = module_of(node)
    if module is not None:
        form = module_form(module)
        if form is None:
            return None
        operands = node.args or tuple(node.kwargs.values())
        return _bind(FUNCTIONS[form[0]], operands, form[1])
    if node.op == "call_function":
        spelling = FUNCTIONS.get(node.target)
        if spelling is None:
            return None
        if node.target in _OPERATORS and not any(is_tensor(operand) for operand in node.args):
            return None  # arithmetic with sizes
        return _bind(spelling, node.args, node.kwargs)
    if node.op == "call_method":
        return _canonical_method(node, str(node.target))
    return None


def _canonical_method(node: fx.Node, name: str) -> _Call | None:
    if name in ("view_as", "reshape_as"):
        with node.graph.inserting_before(node):
            size = node.graph.call_method("size", (node.args[1],))
        copy_meta(node, size, "place")
        return torch.reshape, node.args[:1], {"shape": size}
    if name == "t":
        return torch.transpose, node.args, {"dim0": 0, "dim1": 1}
    if name == "view" and any(isinstance(argument, torch.dtype) for argument in node.args):
        return None  # the same bits as another type: no shape
    if name in METHODS:
        return _bind(METHODS[name], node.args, node.kwargs)
    function: Any = getattr(torch, name, None)
    same = callable(function) and not isinstance(function, type) and hasattr(Tensor, name)
    if not same or name in UNKNOWN_METHODS or not is_tensor(node.args[0]):
        return None
    return function, node.args, dict(node.kwargs)


def _bind(spelling: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call | None:
    """Operands positional, parameters named, defaults filled in; None if something is unknown."""
    given = {("dim" if name == "axis" else name): value for name, value in kwargs.items()}
    operands = list(args[: len(spelling.operands)])
    for name in spelling.operands[len(operands) :]:
        if name not in given:
            return None
        operands.append(given.pop(name))
    rest = args[len(spelling.operands) :]
    names = list(spelling.parameters)
    if spelling.variadic and rest:
        rest = (_sequence(rest),)
    elif spelling.variadic and "size" in given:
        given[names[0]] = given.pop("size")
    if len(rest) > len(names):
        return None
    given |= dict(zip(names, rest, strict=False))
    if any(name not in names and name not in spelling.dropped for name in given):
        return None
    values = {**spelling.parameters, **given}
    if any(value is REQUIRED for value in values.values()):
        return None
    return _finish(spelling, operands, values)


def _finish(spelling: Spelling, operands: list[Any], values: dict[str, Any]) -> _Call:
    function = spelling.function
    values = {
        name: value
        for name, value in values.items()
        if name not in spelling.dropped
        and value is not ABSENT
        and not (name in spelling.optional and value == spelling.parameters[name])
    }
    if "inplace" in values:
        values["inplace"] = False
    if "stride" in values and values["stride"] in (None, [], ()):
        values["stride"] = values["kernel_size"]
    for name in spelling.per_axis:
        if name in values:
            values[name] = _for_each_axis(values[name], spelling.axes)
    if function in (torch.mean, torch.sum) and is_number(values["dim"]):
        values["dim"] = (values["dim"],)
    if function is F.pad and values["mode"] == "constant":
        values["value"] = 0.0 if values["value"] is None else values["value"]
    if function is torch.split and "split_size" in values:
        values["split_size_or_sections"] = values.pop("split_size")
    if function in _COMMUTES and "alpha" not in values and not is_tensor(operands[0]):
        operands.reverse()
    order = list(FUNCTIONS[function].parameters)
    named = {name: _tuple(values[name]) for name in sorted(values, key=order.index)}
    return _same_as_relu(function, tuple(operands), named)


def _same_as_relu(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Call:
    names = {F.hardtanh: ("min_val", "max_val"), torch.clamp: ("min", "max")}.get(function)
    bounds = tuple(kwargs[name] for name in names) if names else None
    if function is F.threshold and kwargs["threshold"] == kwargs["value"] == 0:
        bounds = (0, None)
    # Ready-made bounds only: a bound that is a tensor does not compare to a number.
    if bounds is not None and all(value is None or is_number(value) for value in bounds):
        if bounds == (0, None):
            return F.relu, args, {"inplace": False}
        if bounds == (0, 6):
            return F.relu6, args, {"inplace": False}
    return function, args, kwargs


def _sequence(items: tuple[Any, ...]) -> Any:
    """What a method got as ``(2, 3)``, ``((2, 3),)`` or ``(size,)``, as one argument."""
    if len(items) == 1 and not is_number(items[0]):
        return items[0]
    return items


def _for_each_axis(value: Any, axes: int) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(value) * axes if len(value) == 1 else tuple(value)
    return (value,) * axes if is_number(value) or value is None else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
