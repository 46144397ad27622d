"""Edits of a graph that keep meta, provenance and readable names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

from passes.infra.meta import copy_meta, origins
from passes.infra.stored import set_module

__all__ = ["Rewriter"]


class Rewriter:
    """Edits one GraphModule and remembers whether anything changed.

    New nodes inherit `origin`, `module_path` and `stack_trace` from the node that they stand
    for, and `finish` erases dead code, drops unused submodules, lints and recompiles.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.modified = False

    # -- creating ------------------------------------------------------------------------

    def before(self, node: fx.Node) -> AbstractContextManager[None]:
        """Insert what is created inside the block in front of `node`."""
        return self.graph.inserting_before(node)

    def after(self, node: fx.Node) -> AbstractContextManager[None]:
        """Insert what is created inside the block right behind `node`."""
        return self.graph.inserting_after(node)

    def call_function(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: fx.Node,
        sources: Iterable[fx.Node] = (),
        name: str | None = None,
        same_value: bool = True,
    ) -> fx.Node:
        """A new call of `target` that stands for `like`, whose meta it takes over."""
        node = self.graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)
        return self._adopt(node, like, sources, same_value)

    def call_module(
        self,
        path: str,
        module: nn.Module | None,
        args: tuple[Any, ...],
        *,
        like: fx.Node,
        sources: Iterable[fx.Node] = (),
        name: str | None = None,
        same_value: bool = True,
    ) -> fx.Node:
        """A new call of the module at `path`, which is put there first where one is given."""
        if module is not None:
            set_module(self.graph_module, path, module)
        node = self.graph.create_node(
            "call_module", path, args, {}, name=name or path.replace(".", "_")
        )
        return self._adopt(node, like, sources, same_value)

    def call_method(
        self, method: str, args: tuple[Any, ...], *, like: fx.Node, same_value: bool = False
    ) -> fx.Node:
        """A new method call that stands for `like`."""
        node = self.graph.create_node("call_method", method, args, {})
        return self._adopt(node, like, (), same_value)

    def get_attr(
        self,
        path: str,
        value: torch.Tensor | None,
        *,
        like: fx.Node,
        sources: Iterable[fx.Node] = (),
    ) -> fx.Node:
        """A node that reads the tensor at `path`, which is stored there first if one is given."""
        if value is not None:
            owner_path, _, leaf = path.rpartition(".")
            owner: nn.Module = self.graph_module
            for part in owner_path.split(".") if owner_path else ():
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                child = owner._modules[part]
                assert child is not None
                owner = child
            if leaf in owner._buffers or leaf in owner._parameters:
                delattr(owner, leaf)
            owner.register_buffer(leaf, value)
        node = self.graph.create_node("get_attr", path, (), {}, name=path.replace(".", "_"))
        return self._adopt(node, like, sources, False)

    def _adopt(
        self, node: fx.Node, like: fx.Node, sources: Iterable[fx.Node], same_value: bool
    ) -> fx.Node:
        copy_meta(like, node, "place", *(("shape",) if same_value else ()))
        node.meta["origin"] = origins((like, *sources))
        self.modified = True
        return node

    # -- changing ------------------------------------------------------------------------

    def replace(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """Let every user of `old` read `new`, and erase `old`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.erase(old)
        return new

    def replace_call(
        self,
        old: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        sources: Iterable[fx.Node] = (),
    ) -> fx.Node:
        """Put a call of `target` where `old` stands; the name stays."""
        with self.before(old):
            new = self.call_function(target, args, kwargs, like=old, sources=sources)
        return self._take_place(old, new)

    def replace_with_module(
        self, old: fx.Node, path: str, module: nn.Module, args: tuple[Any, ...]
    ) -> fx.Node:
        """Put a call of `module`, stored at `path`, where `old` stands; name and range stay."""
        with self.before(old):
            new = self.call_module(path, module, args, like=old)
        copy_meta(old, new, "range")
        return self._take_place(old, new)

    def _take_place(self, old: fx.Node, new: fx.Node) -> fx.Node:
        self.replace(old, new)
        # An erased node's name stays reserved, so that asking for it would give `name_1`.
        new.name = old.name
        self.graph._graph_namespace._rename_object(new, old.name)
        return new

    def absorb(self, node: fx.Node, into: fx.Node, *, bypass: bool = False) -> fx.Node:
        """Erase `node`, whose work `into` does from now on; `into` inherits its origin.

        The users of `node` read `into` instead or, with `bypass`, the first operand of `node`.
        """
        heir = node.args[0] if bypass else into
        assert isinstance(heir, fx.Node)
        node.replace_all_uses_with(heir, delete_user_cb=lambda user: user is not heir)
        into.meta["origin"] = origins((into, node))
        self.erase(node)
        return into

    def move_before(self, node: fx.Node, place: fx.Node) -> None:
        """Let `node` run right before `place`."""
        if node.next is not place:
            place.prepend(node)
            self.modified = True

    def redirect(
        self, old: fx.Node, new: fx.Node, where: Callable[[fx.Node], bool] = lambda user: True
    ) -> None:
        """Let the users of `old` that `where` picks read `new` instead."""
        for user in list(old.users):
            if user is not new and where(user):
                user.replace_input_with(old, new)
                self.modified = True

    def set_call(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Give `node` other arguments."""
        if node.args != args or (kwargs is not None and node.kwargs != kwargs):
            node.args = args
            if kwargs is not None:
                node.kwargs = dict(kwargs)
            self.modified = True

    def set_module(self, path: str, module: nn.Module) -> None:
        """Replace the module at `path`."""
        set_module(self.graph_module, path, module)
        self.modified = True

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing uses."""
        self.graph.erase_node(node)
        self.modified = True

    # -- finishing -----------------------------------------------------------------------

    def finish(self) -> bool:
        """Erase dead code and unused submodules, lint, recompile; True where anything changed."""
        erased = self.graph.eliminate_dead_code(is_impure_node=_is_impure)
        self.modified = self.modified or erased
        if self.modified:
            self.graph_module.delete_all_unused_submodules()
            self.graph.lint()
            self.graph_module.recompile()
        return self.modified


def _is_impure(node: fx.Node) -> bool:
    # Inference graphs have no side effects that anyone could see: only the interface stays.
    return node.op in ("placeholder", "output")
