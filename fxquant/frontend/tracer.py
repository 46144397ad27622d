"""The tracer: leaves at `torch.nn`, writes in place recorded, lengths that the graph knows."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from fxquant.errors import ModelError
from fxquant.frontend.doctor import guarded_outcome, user_line
from fxquant.frontend.inputs import fed, parameters
from fxquant.frontend.prepare import drops_or_learns, is_leaf
from fxquant.frontend.structure import Names

__all__ = ["Tracer"]

# ruff: noqa: D102  (torch.fx documents the methods that are overridden)


class _Proxy(fx.Proxy):
    """Records writes in place as such: torch.fx takes ``x += y`` for ``x = x + y``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        length = _known_length(self.node)
        if length is None:
            # A TypeError lets `list` and `*` go on to iterate.
            raise TypeError("'len' of a value that is known only when the model runs")
        return length

    def _write(self, target: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._write(operator.itruediv, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._write(operator.ifloordiv, other)


class Tracer(fx.Tracer):
    """Leaves at `torch.nn` and at `leaves`; remembers in which submodule tracing failed."""

    # A buffer that is sliced by a size, as a causal mask is, must be a value of the graph.
    proxy_buffer_attributes = True

    def __init__(self, leaves: frozenset[str], inputs: int | Sequence[str] | None) -> None:
        super().__init__()
        self.leaves = leaves
        self.inputs = inputs
        self.failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError:
            path = self._install(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # A leaf fails on what it is handed, which is its caller's doing.
            if not self.failed and not self.is_leaf_module(m, path):
                self.failed = path
            raise

    def _install(self, module: nn.Module) -> str:
        # Made inside forward, or kept in a plain list: `model.eval()` did not reach it.
        for part in module.modules():
            if drops_or_learns(part):
                raise ModelError(
                    f"a {type(part).__name__} that is no registered submodule is in training "
                    "mode: make it in __init__ and assign it to self"
                )
        number = sum(name.startswith("made_in_forward") for name in self.root._modules)
        path = f"made_in_forward_{number}"
        self.root.add_module(path, module)
        paths = cast(dict[nn.Module, str], self.submodule_paths)
        for name, submodule in module.named_modules(prefix=path):
            paths.setdefault(submodule, name)
        return path

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta.pop("nn_module_stack", None)
        stack = list(self.module_stack.values())
        node.meta["module_path"] = stack[-1][0] if stack else ""
        node.meta["origin"] = (node.name,)
        line = user_line(sys._getframe(1))
        if line:
            node.meta["stack_trace"] = line
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        bool_frame = sys._getframe(1)  # Proxy.__bool__, which the user's code called
        outcome = guarded_outcome(bool_frame.f_back)
        return super().to_bool(obj) if outcome is None else outcome

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        length = _known_length(obj.node)
        if length is None:
            return super().iter(obj)
        items: Any = obj
        return iter([items[index] for index in range(length)])

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        inputs = self.inputs
        wanted = list(inputs.structures) if isinstance(inputs, Names) else inputs
        chosen = fed(parameters(self.root), wanted, type(self.root).__name__)
        names = inputs if isinstance(inputs, Names) else [name for name, _ in chosen]
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        given = inputs.built(proxies).values() if isinstance(inputs, Names) else proxies
        positional: list[Any] = [self.root]
        named: dict[str, Any] = {}
        order = [p.name for p in parameters(self.root)]
        for (name, parameter), value in zip(chosen, given, strict=True):
            skips = order.index(parameter.name) > len(positional) - 1
            if parameter.kind is not parameter.VAR_POSITIONAL and skips:
                named[name] = value
            else:
                positional.append(value)

        def call(root: nn.Module, *args: Any) -> Any:
            # Not `root_fn`, which is forward alone, without hooks.
            return root(*args, **named)

        return call, positional


def _known_length(node: fx.Node) -> int | None:
    """How many items iterating over the value of `node` gives, where the graph alone says it."""
    if node.target in (torch.chunk, "chunk"):
        chunks = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        return chunks if isinstance(chunks, int) else None
    if node.target in (torch.split, "split"):
        sizes = node.args[1] if len(node.args) > 1 else None
        return len(sizes) if isinstance(sizes, (tuple, list)) else None
    if node.target is operator.getitem and isinstance(node.args[1], slice):
        source, part = node.args[0], node.args[1]
        is_shape = isinstance(source, fx.Node) and (
            source.target == "size" or (source.target is getattr and source.args[1:] == ("shape",))
        )
        if not is_shape or part.step is not None:
            return None
        start, stop = part.start or 0, part.stop
        if isinstance(stop, int) and stop >= start >= 0:
            return stop - start
        if start < 0 and stop is None:
            return -int(start)
    return None
