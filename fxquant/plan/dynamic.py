"""Dynamic quantization: linear and recurrent layers, int8 weights, inputs quantized at run time.

What the stages need to know about it in one place: which nodes take part, how a recurrent layer
simulates its weights, and the operators that a layer becomes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

import fxquant.kernels  # noqa: F401  (registers torch.ops.fxquant)
from fxquant.errors import RecipeError
from fxquant.plan.functional_forms import pair
from fxquant.plan.operations import layer_of
from fxquant.recipe.recipe import Recipe
from fxquant.simulate.observers import weight_qparams
from fxquant.simulate.quantizers import WeightQuantizer
from fxquant.simulate.saturation import fit_pair_sums
from fxquant.spec import QuantSpec
from passes import FusedLayer, Pass, PassResult, Rewriter, tensor_info

__all__ = [
    "QuantizeRecurrentWeights",
    "QuantizedRecurrent",
    "check_dynamic",
    "dynamic_refusal",
    "emit_dynamic",
    "has_batch_dimension",
    "recurrent_macs",
    "recurrent_of",
    "recurrent_quantizers",
]

OPS: Any = torch.ops.fxquant
_RECURRENT = (nn.LSTM, nn.GRU)


# -- which nodes -------------------------------------------------------------------------


def recurrent_of(node: fx.Node, root: nn.Module) -> nn.LSTM | nn.GRU | None:
    """The LSTM or GRU that `node` calls, unwrapped; None for anything else."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, QuantizedRecurrent):
        module = module.layer
    return module if isinstance(module, _RECURRENT) else None


def dynamic_refusal(node: fx.Node, root: nn.Module) -> str:
    """Why a node of an annotated graph is not quantized dynamically; "" where it is."""
    recurrent = recurrent_of(node, root)
    if recurrent is None and not isinstance(layer_of(node, root), nn.Linear):
        return "dynamic quantization keeps it in float"
    if recurrent is not None and recurrent.proj_size > 0:
        return "an LSTM with proj_size has no dynamic form"
    info = tensor_info(_input(node.args, node.kwargs))
    if info is None:
        return "a packed sequence has no dynamic form"
    if info.dtype != torch.float32:
        return f"its input is {info.dtype}, dynamic quantization takes torch.float32"
    return ""


def check_dynamic(recipe: Recipe, weight: QuantSpec | None) -> None:
    """Raise RecipeError where `recipe`, or a layer's weight spec, has no dynamic form."""
    if recipe.activations.bits != 8:
        raise RecipeError(
            "dynamic quantization computes with 8-bit activations, found activations.bits = "
            f"{recipe.activations.bits}: set 8"
        )
    if weight is not None and weight.scheme != "symmetric":
        raise RecipeError(
            f"dynamic quantization takes symmetric weights, found {weight.scheme!r}: set "
            'weights.scheme = "symmetric"'
        )


def recurrent_macs(node: fx.Node, layer: nn.LSTM | nn.GRU) -> int:
    """The multiply-accumulates of one sequence, of the length that the probe has."""
    info = tensor_info(_input(node.args, node.kwargs))
    if info is None:
        return 0
    steps = info.shape[1 if layer.batch_first and len(info.shape) == 3 else 0]
    weights = (v.numel() for name, v in layer.named_parameters() if name.startswith("weight"))
    return int(steps) * sum(weights)


def has_batch_dimension(node: fx.Node) -> bool:
    """Whether the input of a recurrent node has three dimensions and not two."""
    info = tensor_info(_input(node.args, node.kwargs))
    return info is not None and len(info.shape) == 3


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")


# -- the simulated stage -----------------------------------------------------------------


class QuantizedRecurrent(nn.Module):
    """An LSTM or GRU whose weights pass through their quantizers; called as the layer itself."""

    def __init__(self, layer: nn.LSTM | nn.GRU, quantizers: Mapping[str, WeightQuantizer]) -> None:
        super().__init__()
        self.layer = layer
        self.quantizers = nn.ModuleDict(quantizers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives with the quantized weights."""
        weights = {name: q(getattr(self.layer, name)) for name, q in self.quantizers.items()}
        return functional_call(self.layer, weights, args, kwargs)

    @property
    def operation(self) -> str:
        """The name in listings: ``lstm`` or ``gru``."""
        return type(self.layer).__name__.lower()

    @property
    def detail(self) -> str:
        """The first weight's quantizer as listings show it."""
        return str(next(iter(self.quantizers.values())).detail)


class QuantizeRecurrentWeights(Pass):
    """Put quantizers on the weights of LSTMs and GRUs.

        before                 after
        y = lstm(x)            y = lstm(x; every W through its quantizer)

    Exact as long as the quantizers are disabled.
    """

    exact = True

    def __init__(self, quantizers: Mapping[str, Mapping[str, WeightQuantizer]]) -> None:
        self.quantizers = quantizers

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Wrap the layers of the named nodes, once."""
        rewriter = Rewriter(graph_module)
        for node in graph_module.graph.nodes:
            layer, path = recurrent_of(node, graph_module), str(node.target)
            if layer is None or node.name not in self.quantizers:
                continue
            if graph_module.get_submodule(path) is layer:
                quantizers = self.quantizers[node.name]
                rewriter.set_module(path, QuantizedRecurrent(layer, quantizers))
        return PassResult(rewriter.finish())


def recurrent_quantizers(
    graph_module: fx.GraphModule, weights: Mapping[str, QuantSpec], target: str
) -> tuple[dict[str, dict[str, WeightQuantizer]], list[str]]:
    """Disabled quantizers for the weights of every recurrent node in `weights`, and notes."""
    quantizers: dict[str, dict[str, WeightQuantizer]] = {}
    notes: list[str] = []
    for node in graph_module.graph.nodes:
        layer, spec = recurrent_of(node, graph_module), weights.get(node.name)
        if layer is None or spec is None:
            continue
        for name, value in layer.named_parameters():
            if not name.startswith("weight"):
                continue
            path, weight = f"{node.target}.{name}", value.detach()
            qparams = weight_qparams(weight, spec, 0, path)
            if target == "x86":
                qparams, note = fit_pair_sums(path, weight, spec, qparams)
                notes += [note] if note else []
            quantizers.setdefault(node.name, {})[name] = WeightQuantizer(qparams, enabled=False)
    return quantizers, notes


# -- the integer stage -------------------------------------------------------------------

Constant = Callable[[str, Tensor], fx.Node]
Call = Callable[[Any, tuple[Any, ...]], fx.Node]


def emit_dynamic(
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batched: bool,
    constant: Constant,
    call: Call,
) -> fx.Node:
    """The operators that stand for ``module(*args, **kwargs)``, without a fused activation.

    `constant` stores a tensor under a path, `call` creates a function call. `batched` is whether
    a recurrent layer's input has a batch dimension.
    """
    if isinstance(module, QuantizedRecurrent):
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        return _emit_recurrent(path, module, _input(args, kwargs), hx, batched, constant, call)
    assert isinstance(module, FusedLayer)
    assert isinstance(module.weight_quantizer, WeightQuantizer)
    layer: Any = module.layer
    weight, scale = _weight(f"{path}.weight", layer.weight, module.weight_quantizer, constant)
    bias = None if layer.bias is None else constant(f"{path}.bias", layer.bias)
    return call(OPS.linear_dynamic.default, (_input(args, kwargs), weight, scale, bias))


def _weight(
    path: str, weight: Tensor, quantizer: WeightQuantizer, constant: Constant
) -> tuple[fx.Node, fx.Node]:
    codes = quantizer.quantize(weight.detach())
    return constant(path, codes), constant(f"{path}_scale", quantizer.qparams.scale)


def _emit_recurrent(
    path: str,
    module: QuantizedRecurrent,
    x: fx.Node,
    hx: Any,
    batched: bool,
    constant: Constant,
    call: Call,
) -> fx.Node:
    """An LSTM or GRU, with the pair of output and state that the module returns."""
    layer = module.layer
    lstm = isinstance(layer, nn.LSTM)
    batch_dim = 0 if layer.batch_first else 1
    state = _initial_state(hx, lstm, call)
    if not batched:
        x = call(torch.unsqueeze, (x, batch_dim))
        state = [call(torch.unsqueeze, (value, 1)) for value in state]
    weights, scales, biases = [], [], []
    for name, value in layer.named_parameters():
        if name.startswith("bias"):
            biases.append(constant(f"{path}.{name}", value))
            continue
        quantizer = module.quantizers[name]
        assert isinstance(quantizer, WeightQuantizer)
        weight, scale = _weight(f"{path}.{name}", value, quantizer, constant)
        weights.append(weight)
        scales.append(scale)
    options = (layer.num_layers, layer.bidirectional, layer.batch_first)
    target = OPS.lstm_dynamic.default if lstm else OPS.gru_dynamic.default
    result = call(target, (x, state, weights, scales, biases, *options))
    y, *state = (call(operator.getitem, (result, index)) for index in range(3 if lstm else 2))
    if not batched:
        y = call(torch.squeeze, (y, batch_dim))
        state = [call(torch.squeeze, (value, 1)) for value in state]
    return call(pair, (y, call(pair, tuple(state)) if lstm else state[0]))


def _initial_state(hx: Any, lstm: bool, call: Call) -> list[fx.Node]:
    """The initial state as a list of one node for h, and one for c; empty for zeros."""
    if hx is None:
        return []
    if not lstm:
        return [hx]
    if isinstance(hx, fx.Node):
        return [call(operator.getitem, (hx, index)) for index in range(2)]
    return list(hx)
