"""A native part of a graph as a module: programs for the shapes that come."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxquant.backends.native.executor import CompiledSegment, compile_segment

__all__ = ["NativeProgram"]


class NativeProgram(nn.Module):
    """Runs a graph natively; a shape that is new is planned, and built where kernels are missing.

    The graph's output is a tuple of tensors. Copies share what is built; pickles hold the graph
    alone, and build again.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        # Hidden from torch: its constants belong to the integer graph.
        self.__dict__["graph_module"] = graph_module
        self.__dict__["programs"] = {}
        self.__dict__["lock"] = threading.Lock()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Raises TargetError where a program for new shapes cannot be built."""
        found = self.programs.get(_key(inputs, 1)) or self.programs.get(_key(inputs, 0))
        return (found or self.prepare(inputs))(*inputs)

    def prepare(self, inputs: Sequence[Any]) -> CompiledSegment:
        """The program for inputs of these shapes: for any batch, where samples are independent."""
        with self.lock:
            found = self.programs.get(_key(inputs, 1)) or self.programs.get(_key(inputs, 0))
            if found is None:
                found = compile_segment(self.graph_module, inputs)
                self.programs[_key(inputs, 0 if found.batch is None else 1)] = found
        return found

    @property
    def segments(self) -> list[CompiledSegment]:
        """What has been built so far."""
        return list(self.programs.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeProgram:
        copied = NativeProgram(self.graph_module)
        copied.__dict__["programs"] = self.programs
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "programs": {}, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["lock"] = threading.Lock()

    graph_module: fx.GraphModule
    programs: dict[tuple[Any, ...], CompiledSegment]
    lock: threading.Lock


def _key(inputs: Sequence[Any], first: int) -> tuple[Any, ...]:
    """The shapes from dimension `first` on."""
    return (first, *(x.shape[first:] for x in inputs))
