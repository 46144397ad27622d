"""What a graph module holds by dotted paths, and which nodes call or read it."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import Tensor, fx, nn

__all__ = [
    "call_sites", "constant_value", "drop_unread", "free_path", "get_tensor", "is_plain",
    "module_of", "overrides_forward", "set_module", "stored_reads",
]  # fmt: skip

_M = TypeVar("_M", bound=nn.Module)


def module_of(node: Any) -> nn.Module | None:
    """The module that `node` calls; None where it is not a call of a module."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def overrides_forward(module: nn.Module) -> bool:
    """Whether a call of `module` runs more than the forward of its class in `torch.nn`.

    That is code of a subclass, a forward or hooks of the object's own. Weights and
    hyper-parameters do not describe what such a module computes.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return True
    owners = (_owner(type(module), name) for name in ("__call__", "forward", "_conv_forward"))
    return any(owner and not owner.__module__.startswith("torch.nn") for owner in owners)


def _owner(kind: type, name: str) -> type | None:
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def is_plain(module: Any, types: type[_M] | tuple[type[_M], ...]) -> TypeGuard[_M]:
    """Whether `module` is one of `types`, as ``isinstance`` says, and computes what that does."""
    return isinstance(module, types) and not overrides_forward(module)


def get_tensor(root: nn.Module, path: str) -> Tensor:
    """The parameter, buffer or plain tensor attribute at a dotted `path`."""
    parent, _, leaf = path.rpartition(".")
    value = getattr(root.get_submodule(parent), leaf)
    if not isinstance(value, Tensor):
        raise AttributeError(f"{path} is a {type(value).__name__}, not a tensor")
    return value


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted `path`, making empty parents where they are missing."""
    *parents, leaf = path.split(".")
    owner = root
    for name in parents:
        child = owner._modules.get(name)
        if child is None:
            child = nn.Module()
            owner.add_module(name, child)
        owner = child
    if leaf in owner._modules:
        owner._modules[leaf] = module
    else:
        owner.add_module(leaf, module)


def free_path(root: nn.Module, path: str, *, suffixed: bool = False) -> str:
    """`path`, or ``path_1``, ``path_2``, … where something is there already.

    `suffixed`: never `path` itself.
    """
    number = 1 if suffixed else 0
    free = f"{path}_{number}" if number else path
    while _exists(root, free):
        number += 1
        free = f"{path}_{number}"
    return free


def _exists(root: nn.Module, path: str) -> bool:
    value: Any = root
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def call_sites(graph: fx.Graph) -> dict[str, int]:
    """How many nodes call the module at each path."""
    sites: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            sites[str(node.target)] = sites.get(str(node.target), 0) + 1
    return sites


def constant_value(node: Any) -> Tensor | None:
    """The tensor that a get_attr node reads; None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    try:
        return get_tensor(owner, str(node.target)).detach()
    except AttributeError:
        return None


def stored_reads(graph_module: fx.GraphModule) -> set[str]:
    """The paths of all tensors that get_attr nodes read."""
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}


def drop_unread(graph_module: fx.GraphModule, before: set[str]) -> None:
    """Forget the tensors in `before` that no get_attr node reads any more.

    What lies inside a module that is called belongs to it and stays.
    """
    called = call_sites(graph_module.graph)
    for path in before - stored_reads(graph_module):
        owner, _, leaf = path.rpartition(".")
        inside = any(owner == site or owner.startswith(f"{site}.") for site in called)
        try:
            module = graph_module.get_submodule(owner)
        except AttributeError:
            continue
        if not inside and hasattr(module, leaf):
            delattr(module, leaf)
