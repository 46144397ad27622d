"""Writing several nodes in the place of one, in canonical form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.infra.base import TensorInfo, module_path, tensor_info
from passes.infra.meta import copy_meta
from passes.infra.rewrite import Rewriter
from passes.infra.stored import call_sites, free_path, get_tensor

__all__ = ["Expansion"]


class Expansion:
    """Writes, in front of `node`, the nodes that are to stand for it.

    They inherit the meta of `node` and the origins of `sources`; what is stored goes to `path`,
    by default the module that `node` belongs to.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        node: fx.Node,
        *,
        path: str | None = None,
        sources: Iterable[fx.Node] = (),
    ) -> None:
        self.rewriter = rewriter
        self.node = node
        self.path = module_path(node) if path is None else path
        self.sources = tuple(sources)

    def call(self, function: Callable[..., Any], *operands: Any, **parameters: Any) -> fx.Node:
        """A call of `function`: tensors positional, all else by name."""
        with self.rewriter.before(self.node):
            node = self.rewriter.call_function(
                function,
                operands,
                parameters,
                like=self.node,
                sources=self.sources,
                same_value=False,
            )
        return _annotated(node, lambda *args: function(*args, **parameters), operands)

    def reshape(self, x: fx.Node, *shape: int) -> fx.Node:
        """``torch.reshape(x, shape=shape)``."""
        return self.call(torch.reshape, x, shape=shape)

    def permute(self, x: fx.Node, *dims: int) -> fx.Node:
        """``torch.permute(x, dims=dims)``; `x` itself where nothing moves."""
        return x if dims == tuple(range(len(dims))) else self.call(torch.permute, x, dims=dims)

    def pad(self, x: fx.Node, *pad: int) -> fx.Node:
        """``F.pad`` with zeros; `x` itself where there is nothing to pad."""
        return self.call(F.pad, x, pad=pad, mode="constant", value=0.0) if any(pad) else x

    def linear(self, name: str, layer: nn.Linear, x: fx.Node) -> fx.Node:
        """A call of `layer`, which goes to `name` below the path, or beside what is there.

        A linear layer that held its weight there before, and that no node calls, makes room.
        """
        root = self.rewriter.graph_module
        path = f"{self.path}.{name}" if self.path else name
        called = call_sites(self.rewriter.graph)
        if path in called or _held(root, path) is not layer.weight:
            path = free_path(root, path)
        with self.rewriter.before(self.node):
            call = self.rewriter.call_module(
                path, layer, (x,), like=self.node, sources=self.sources, same_value=False
            )
        call.meta["module_path"] = path
        return _annotated(call, partial(F.linear, weight=layer.weight.to("meta")), (x,))

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A read of `value`, which is stored as a buffer called `name` below the path."""
        path = free_path(self.rewriter.graph_module, f"{self.path}.{name}" if self.path else name)
        with self.rewriter.before(self.node):
            node = self.rewriter.get_attr(path, value, like=self.node, sources=self.sources)
        node.meta["tensor"] = TensorInfo(tuple(value.shape), value.dtype)
        return node

    def finish(self, result: fx.Node, *, keep_name: bool = False) -> fx.Node:
        """Let the users of `node` read `result`, which may take its name, and erase `node`."""
        copy_meta(self.node, result, "shape")
        self.rewriter.replace(self.node, result)
        if keep_name:
            # An erased node's name stays reserved, so that asking for it would give `name_1`.
            result.name = self.node.name
            self.rewriter.graph._graph_namespace._rename_object(result, self.node.name)
        return result


def _annotated(node: fx.Node, function: Callable[..., Any], operands: tuple[Any, ...]) -> fx.Node:
    """`node` with the shape and dtype of what `function` gives, where those of operands are known.

    What comes later in the same pass asks for them.
    """
    sources: list[fx.Node] = []
    fx.map_arg(operands, sources.append)
    if all(tensor_info(source) for source in sources):
        with torch.no_grad():
            result = function(*fx.map_arg(operands, _without_contents))
        node.meta["tensor"] = TensorInfo(tuple(result.shape), result.dtype)
    return node


def _without_contents(node: fx.Node) -> Any:
    info = tensor_info(node)
    assert info is not None
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _held(root: nn.Module, path: str) -> Tensor | None:
    try:
        return get_tensor(root, f"{path}.weight")
    except AttributeError:
        return None
