"""Layers of torch that stay float in an integer graph, as data: a class of a table, arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.frontend.prepare import FloatLeaf
from passes import overrides_forward

__all__ = ["build_module", "describe_module"]

_INSTANCE_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_WINDOWS = ("kernel_size", "dilation", "padding", "stride")
_RECURRENT = (
    "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
)  # fmt: skip
_CLASSES: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.InstanceNorm1d: _INSTANCE_NORM,
    nn.InstanceNorm2d: _INSTANCE_NORM,
    nn.InstanceNorm3d: _INSTANCE_NORM,
    nn.LocalResponseNorm: ("size", "alpha", "beta", "k"),
    nn.Unfold: _WINDOWS,
    nn.Fold: ("output_size", *_WINDOWS),
    nn.LSTM: (*_RECURRENT, "proj_size"),
    nn.GRU: _RECURRENT,
    nn.RNN: (*_RECURRENT, "nonlinearity"),
}
"""What a file may name: torch's own classes, with the arguments that are their attributes too."""


def describe_module(module: nn.Module) -> dict[str, Any] | None:
    """Class, arguments and, of a FloatLeaf, its reason; None for what is not in the table."""
    inner = module.module if isinstance(module, FloatLeaf) else module
    if type(inner) not in _CLASSES or overrides_forward(inner):
        return None
    return {
        "class": type(inner).__name__,
        "arguments": {name: getattr(inner, name) for name in _CLASSES[type(inner)]},
        "why_float": module.why_float if isinstance(module, FloatLeaf) else None,
    }


def build_module(described: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The module of `describe_module`'s data with the tensors of `state`, by its own names.

    Raises KeyError for a class outside of the table, RuntimeError where the tensors do not fit.
    """
    kind = {each.__name__: each for each in _CLASSES}[described["class"]]
    given = described["arguments"]
    # A crafted size takes no memory: there are no values but those of the file.
    with torch.device("meta"):
        module = kind(**{name: given[name] for name in _CLASSES[kind]}).eval()
    why = described["why_float"]
    whole = module if why is None else FloatLeaf(module, str(why)).eval()
    whole.load_state_dict(dict(state), assign=True)
    return whole
