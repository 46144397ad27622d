"""Layers that quantize their own input at run time: the operators that they become."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.plan.dynamic import recurrent_input
from fxquant.simulate.quantizers import WeightQuantizer
from fxquant.simulate.recurrent import QuantizedRecurrent
from fxquant.to_integer.conversion import OPS, Conversion
from fxquant.to_integer.functional import pair
from fxquant.to_integer.layers import activate
from passes import FusedLayer
from passes.layers.questions import activation_of

__all__ = ["dynamic_operation"]


def dynamic_operation(conversion: Conversion, node: fx.Node) -> fx.Node:
    """A linear or recurrent layer, float in and float out."""
    path = str(node.target)
    module = conversion.source.get_submodule(path)
    args = fx.map_arg(node.args, conversion.float_or_plain)
    kwargs = dict(fx.map_arg(node.kwargs, conversion.float_or_plain))
    x: Any = args[0] if args else kwargs["input"]
    if isinstance(module, QuantizedRecurrent):
        info = recurrent_input(node)
        batched = info is not None and len(info.shape) == 3
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        return _emit_recurrent(conversion, path, module, x, hx, batched)
    assert isinstance(module, FusedLayer)
    layer: Any = module.layer
    quantizer = module.weight_quantizer
    weight, scale = _weight(conversion, f"{path}.weight", layer.weight, quantizer)
    bias = None if layer.bias is None else conversion.constant(f"{path}.bias", layer.bias)
    y = _call(conversion, OPS.linear_dynamic.default, x, weight, scale, bias)
    if len(args) > 1:
        y = _call(conversion, torch.add, y, args[1])
    return activate(conversion, y, activation_of(node))


def _call(conversion: Conversion, target: Any, *operands: Any) -> fx.Node:
    return conversion.emit(target, operands, None)


def _weight(
    conversion: Conversion, path: str, weight: Tensor, quantizer: nn.Module | None
) -> tuple[fx.Node, fx.Node]:
    assert isinstance(quantizer, WeightQuantizer)
    integers, zero_point = quantizer.integers(weight.detach())
    assert zero_point is None, "check_dynamic refuses weights that need one"
    return conversion.constant(path, integers), conversion.constant(
        f"{path}_scale", quantizer.qparams.scale
    )


def _emit_recurrent(
    conversion: Conversion,
    path: str,
    module: QuantizedRecurrent,
    x: fx.Node,
    hx: Any,
    batched: bool,
) -> fx.Node:
    """An LSTM or GRU, with the pair of output and state that the module returns."""
    layer = module.layer
    lstm = isinstance(layer, nn.LSTM)
    batch_dim = 0 if layer.batch_first else 1
    state = _initial_state(conversion, hx, lstm)
    if not batched:
        x = _call(conversion, torch.unsqueeze, x, batch_dim)
        state = [_call(conversion, torch.unsqueeze, value, 1) for value in state]
    weights, scales, biases = [], [], []
    for name, value in layer.named_parameters():
        if name.startswith("bias"):
            biases.append(conversion.constant(f"{path}.{name}", value))
            continue
        weight, scale = _weight(conversion, f"{path}.{name}", value, module.quantizers[name])
        weights.append(weight)
        scales.append(scale)
    options = (layer.num_layers, layer.bidirectional, layer.batch_first)
    target = OPS.lstm_dynamic.default if lstm else OPS.gru_dynamic.default
    result = _call(conversion, target, x, state, weights, scales, biases, *options)
    y, *state = _items(conversion, result, 3 if lstm else 2)
    if not batched:
        y = _call(conversion, torch.squeeze, y, batch_dim)
        state = [_call(conversion, torch.squeeze, value, 1) for value in state]
    return _call(conversion, pair, y, _call(conversion, pair, *state) if lstm else state[0])


def _initial_state(conversion: Conversion, hx: Any, lstm: bool) -> list[fx.Node]:
    """The initial state as a list of one node for h, and one for c; empty for zeros."""
    if hx is None:
        return []
    if not lstm:
        return [hx]
    return _items(conversion, hx, 2) if isinstance(hx, fx.Node) else list(hx)


def _items(conversion: Conversion, values: fx.Node, count: int) -> list[fx.Node]:
    return [_call(conversion, operator.getitem, values, index) for index in range(count)]
