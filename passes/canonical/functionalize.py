"""Writes in place become new values: what was read after the write reads the new value."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.canonical.values import is_tensor
from passes.infra.base import module_path
from passes.infra.errors import UnsupportedGraphError
from passes.infra.meta import copy_meta
from passes.infra.rewrite import Rewriter
from passes.infra.stored import module_of

__all__ = ["functionalize", "with_item"]

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}
_NO_WRITES = ("requires_grad_", "share_memory_", "rename_")
_SAME_VALUE_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd)
_SAME_VALUE = ("dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "detach")
_RESHAPES = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "view_as", "unflatten")
_PIECES = ("chunk", "split", "unbind", "tensor_split")
_OTHER_VIEWS = (
    *_PIECES,
    *("transpose", "permute", "t", "swapaxes", "movedim", "diagonal", "narrow", "select"),
    *("expand", "expand_as", "contiguous", "to", "float"),
)


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of `x` with ``x[index] = value``."""
    changed = x.clone()
    changed[index] = value
    return changed


def functionalize(rewriter: Rewriter) -> None:
    """Replace every write into a tensor by a new value, for all names under which it is read.

    A view that was taken before the write, and the tensor that a written view belongs to, are
    rebuilt from the new value where they are read afterwards.

    Raises PassError where a tensor is read after a write into a view of it that cannot be undone.
    """
    for node in list(rewriter.graph.nodes):
        if node.target in _OPERATORS and not is_tensor(node.args[0]):
            rewriter.replace_call(node, _OPERATORS[node.target], node.args)  # of numbers
            continue
        written = _written(node)
        if written is not None:
            new = _functional(rewriter, node, written)
            _let_later_readers_see(rewriter, written, new)


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that `node` writes into, if it does."""
    operand = node.args[0] if node.args else node.kwargs.get("input")
    if isinstance(node.kwargs.get("out"), fx.Node):
        operand = node.kwargs["out"]
    elif not _writes_first_operand(node):
        return None
    return operand if isinstance(operand, fx.Node) else None


def _writes_first_operand(node: fx.Node) -> bool:
    module, name = module_of(node), _name(node)
    if module is not None:
        inplace = vars(module).get("inplace") is True
        return inplace and not isinstance(module, nn.modules.dropout._DropoutNd)
    if "dropout" in name or name in (*_NO_WRITES, "and_", "or_", "not_", "is_"):
        return False
    if node.target in _OPERATORS or node.target is operator.setitem:
        return True
    ends = name.endswith("_") and not name.endswith("__")
    return ends or node.kwargs.get("inplace") is True


def _functional(rewriter: Rewriter, node: fx.Node, written: fx.Node) -> fx.Node:
    """The same operation without the write."""
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "out")}
    module = module_of(node)
    if module is not None:
        vars(module)["inplace"] = False
        rewriter.modified = True
        return node
    if node.target in _OPERATORS:
        return rewriter.replace_call(node, _OPERATORS[node.target], node.args, kwargs)
    if node.target is operator.setitem:
        with rewriter.before(node):
            new = rewriter.call_function(
                with_item,
                node.args,
                like=node,
                sources=(written,),
                name="with_item",
                same_value=False,
            )
        copy_meta(written, new, "shape")
        rewriter.erase(node)
        return new
    if not _name(node).endswith("_"):
        rewriter.set_call(node, node.args, kwargs)
        return node
    name = _name(node)[:-1]
    if name == "copy":
        return rewriter.replace_call(node, with_item, (written, ..., node.args[1]))
    if name in ("zero", "fill"):
        filled = torch.zeros_like if name == "zero" else torch.full_like
        return rewriter.replace_call(node, filled, node.args, kwargs)
    if node.op == "call_method" and callable(getattr(Tensor, name, None)):
        node.target = name
        rewriter.modified = True
        return node
    function = getattr(torch, name, None) or getattr(F, name, None)
    if not callable(function):
        raise UnsupportedGraphError(
            f"canonicalize: {node.name}: no form of {name}_ without the write is known"
        )
    return rewriter.replace_call(node, function, node.args, kwargs)


def _let_later_readers_see(rewriter: Rewriter, written: fx.Node, new: fx.Node) -> None:
    order = {node: index for index, node in enumerate(rewriter.graph.nodes)}
    now = order[new]

    def later_users(node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user is not new and order.get(user, 0) > now]

    def redirect(node: fx.Node, value: fx.Node) -> None:
        users = later_users(node)
        rewriter.redirect(node, value, lambda user: user in users)

    if not _is_view(written) and not any(_is_view(user) for user in written.users):
        redirect(written, new)
        return
    parents = _views(rewriter.graph, order, now)
    chain = [written]  # up to the tensor that owns the memory
    while chain[-1] in parents:
        chain.append(parents[chain[-1]])
    family = [node for node in parents if _root(node, parents) is chain[-1]]
    if chain[-1] not in family:
        family.append(chain[-1])
    read_later = [node for node in family if later_users(node)]
    values = {written: new}
    with rewriter.before(new.next):
        if set(read_later) - {written}:
            for part, whole in itertools.pairwise(chain):
                value = _whole_from_part(rewriter, whole, part, values[part])
                if value is None:
                    break
                values[whole] = value
        for node in read_later:
            renewed = _renewed(rewriter, node, parents, values)
            if renewed is not None:
                redirect(node, renewed)
            elif not _apart(node, chain, parents, later_users(node)):
                raise UnsupportedGraphError(
                    f"canonicalize: {written.name} ({module_path(written) or 'root'}) is written "
                    f"in place and is a view of {node.name}, which is read later: write it out of "
                    "place"
                )


def _apart(
    node: fx.Node, chain: list[fx.Node], parents: dict[fx.Node, fx.Node], users: list[fx.Node]
) -> bool:
    """Whether `node` is read only in pieces of a split that the written piece does not touch."""
    split = next((whole for whole in chain[1:] if _name(whole) in _PIECES), None)
    if split is None:
        return False
    piece = chain[chain.index(split) - 1]
    if node is split:
        return all(u.target is operator.getitem and bool(u.args[1] != piece.args[1]) for u in users)
    while node in parents and parents[node] is not split:
        node = parents[node]
    return node in parents and bool(node.args[1] != piece.args[1])


def _views(graph: fx.Graph, order: dict[fx.Node, int], now: int) -> dict[fx.Node, fx.Node]:
    """Every node before `now` that shares memory with its first argument, and that argument."""
    return {
        node: node.args[0]
        for node in graph.nodes
        if order[node] < now and _is_view(node) and isinstance(node.args[0], fx.Node)
    }


def _is_view(node: fx.Node) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        return isinstance(module_of(node), (*_SAME_VALUE_MODULES, nn.Flatten, nn.Unflatten))
    if node.target is operator.getitem:
        source = node.args[0]
        # Indexing by a tensor copies; indexing a shape yields no tensor.
        indices = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        of_tensors = isinstance(source, fx.Node) and (is_tensor(source) or _name(source) in _PIECES)
        return of_tensors and not any(isinstance(i, (fx.Node, list)) for i in indices)
    return _name(node) in (*_SAME_VALUE, *_RESHAPES, *_OTHER_VIEWS)


def _root(node: fx.Node, parents: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in parents:
        node = parents[node]
    return node


def _whole_from_part(
    rewriter: Rewriter, whole: fx.Node, part: fx.Node, new: fx.Node
) -> fx.Node | None:
    """What `whole` holds after its view `part` was overwritten by `new`; None: no way."""
    if _name(part) in _SAME_VALUE or isinstance(module_of(part), _SAME_VALUE_MODULES):
        return new
    if _name(part) in _RESHAPES or isinstance(module_of(part), (nn.Flatten, nn.Unflatten)):
        size = rewriter.call_method("size", (whole,), like=new)
        call: tuple[Any, tuple[Any, ...], dict[str, Any]] = (torch.reshape, (new,), {"shape": size})
    elif part.target is operator.getitem and _name(whole) not in _PIECES:
        call = with_item, (whole, part.args[1], new), {}
    else:
        return None
    result = rewriter.call_function(*call, like=new, same_value=False)
    copy_meta(whole, result, "shape")
    return result


def _renewed(
    rewriter: Rewriter,
    node: fx.Node,
    parents: dict[fx.Node, fx.Node],
    values: dict[fx.Node, fx.Node],
) -> fx.Node | None:
    """The view `node` taken again, of what its source holds now; None where nothing changed."""
    if node in values:
        return values[node]
    if node not in parents:
        return None
    source = _renewed(rewriter, parents[node], parents, values)
    if source is None:
        return None
    copied = rewriter.graph.node_copy(node, lambda n: source if n is parents[node] else n)
    rewriter.modified = True
    values[node] = copied
    return copied
