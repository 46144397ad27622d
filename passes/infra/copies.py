"""Copies of graphs for the next stage, with the tensors of the one before."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn

__all__ = ["copy_sharing_tensors"]

_CONTAINERS = (dict, OrderedDict, set)
_ATOMS = (int, float, str, bool, type(None), torch.dtype)


def copy_sharing_tensors(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of graph and modules whose parameters and buffers are the same tensors.

    Passes replace tensors and never write into them, so that stages can share what did not
    change and a large network is not held once for every stage.
    """
    known: dict[int, Any] = {}
    for tensor in (*graph_module.parameters(), *graph_module.buffers()):
        known[id(tensor)] = tensor
    # Constants that tracing left as plain attributes are shared as well.
    for module in graph_module.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                known[id(value)] = value
    inner = [module for module in graph_module.modules() if module is not graph_module]
    for module in reversed(inner):
        if id(module) not in known and _copies_plainly(module):
            _copy_attributes(module, known)
    return copy.deepcopy(graph_module, known)


def _copies_plainly(module: nn.Module) -> bool:
    kind: Any = type(module)
    return (
        not hasattr(module, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
    )


def _copy_attributes(module: Any, known: dict[int, Any]) -> None:
    """What `deepcopy` does with a plain module, children first.

    Most that a module holds are numbers and empty dictionaries of hooks, on which it would spend
    its time.
    """
    kind: Any = type(module)
    twin = known[id(module)] = kind.__new__(kind)
    state = {}
    for name, value in module.__getstate__().items():
        if type(value) in _ATOMS:
            state[name] = value
        elif type(value) in _CONTAINERS and not value:
            state[name] = value.copy()
        else:
            state[name] = copy.deepcopy(value, known)
    twin.__setstate__(state)
