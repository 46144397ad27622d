"""What a pass is: a function from a GraphModule to a changed GraphModule, with reasons."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

__all__ = ["Decline", "Pass", "PassResult", "TensorInfo", "module_path", "shape_of", "tensor_info"]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a value on the probe inputs; kept in ``node.meta["tensor"]``."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Decline:
    """A place where a pass could have acted and did not, and why.

    `node` is the node's name, `path` the module that it belongs to.
    """

    node: str
    reason: str
    path: str = ""

    @classmethod
    def at(cls, node: fx.Node, reason: str) -> Decline:
        """A decline that takes its names from `node`."""
        return cls(node.name, reason, module_path(node))


@dataclass(frozen=True)
class PassResult:
    """What a run of a pass did.

    `changes` has a line for each layer whose tensors changed where the listing shows nothing.
    """

    modified: bool
    declines: tuple[Decline, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    changes: tuple[str, ...] = field(default=())


class Pass(ABC):
    """Rewrites a GraphModule in place and says truthfully whether it did.

    `exact` promises the same outputs up to float rounding, which the pipeline checks.
    `after` names the passes that, where they are in the pipeline at all, must stand earlier.
    `name` is the class name in snake case: ``FoldBatchNorm`` is ``fold_batch_norm``.
    """

    exact: ClassVar[bool] = True
    after: ClassVar[tuple[type[Pass], ...]] = ()
    name: ClassVar[str] = "pass"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""


def module_path(node: fx.Node) -> str:
    """The path of the module that `node` came from; "" for the root."""
    path = node.meta.get("module_path")
    if path is None:
        path = str(node.target) if node.op == "call_module" else ""
    return str(path)


def tensor_info(node: Any) -> TensorInfo | None:
    """The one tensor that `node` yields on the probe inputs, or None."""
    info = node.meta.get("tensor") if isinstance(node, fx.Node) else None
    return info if isinstance(info, TensorInfo) else None


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape of the tensor that `node` gives on the probe inputs, or None."""
    info = tensor_info(node)
    return info.shape if info is not None else None
