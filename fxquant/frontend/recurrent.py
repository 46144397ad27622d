"""LSTM, GRU and RNN as `torch.export` writes them, as the modules that they came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.infra.stored import get_tensor

__all__ = ["recurrent_module"]

_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "aten::lstm": (nn.LSTM, {}),
    "aten::gru": (nn.GRU, {}),
    "aten::rnn_tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "aten::rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def recurrent_module(
    node: fx.Node, args: tuple[Any, ...], root: nn.Module
) -> tuple[nn.RNNBase, tuple[Any, ...]] | None:
    """The module whose call `node` is, and its operands; None where it is no recurrent layer.

    `args` are the operands of `node` in a graph whose stored tensors `root` holds. A state of
    zeros that the layer has made itself is left out.
    """
    target: Any = node.target
    if target._schema.name not in _KINDS or target._overloadname != "input":
        return None
    x, state, weights, biases, layers, _, train, bidirectional, batch_first = args
    if train or any(weight.op != "get_attr" for weight in weights):
        return None
    tensors = [get_tensor(root, str(weight.target)) for weight in weights]
    kind, options = _KINDS[target._schema.name]
    gates = {nn.LSTM: 4, nn.GRU: 3}.get(kind, 1)
    hidden = tensors[0].shape[0] // gates
    if kind is nn.LSTM and len(tensors) % (5 if biases else 3) == 0 and _projects(tensors, hidden):
        return None
    with torch.device("meta"):
        module: nn.RNNBase = kind(
            tensors[0].shape[1],
            hidden,
            layers,
            bias=biases,
            batch_first=batch_first,
            bidirectional=bidirectional,
            **options,
        )
    names = [name for group in module._all_weights for name in group]
    for name, tensor in zip(names, tensors, strict=True):
        held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
        module.register_parameter(name, held)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    states = tuple(state) if isinstance(state, (list, tuple)) else (state,)
    own = all(isinstance(s, fx.Node) and s.target is torch.zeros for s in states)
    if own:
        return module.eval(), (x,)
    return module.eval(), (x, states if kind is nn.LSTM else states[0])


def _projects(tensors: list[Tensor], hidden: int) -> bool:
    return tensors[1].shape[1] != hidden
