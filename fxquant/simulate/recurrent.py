"""LSTMs and GRUs in the simulated graph: their weights pass through quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.func import functional_call

from fxquant.plan.dynamic import recurrent_of
from fxquant.simulate.observers import weight_qparams
from fxquant.simulate.quantizers import WeightQuantizer
from fxquant.simulate.weight_fit import WeightRefusal, fit_weight
from fxquant.spec import QuantSpec
from passes import Pass, PassResult, Rewriter

__all__ = ["QuantizeRecurrentWeights", "QuantizedRecurrent", "recurrent_quantizers"]


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
            layer = recurrent_of(node, graph_module)
            if layer is not None and node.name in self.quantizers:
                quantized = QuantizedRecurrent(layer, self.quantizers[node.name])
                rewriter.set_module(str(node.target), quantized)
        return PassResult(rewriter.finish())


def recurrent_quantizers(
    graph_module: fx.GraphModule,
    weights: Mapping[str, QuantSpec],
    refusal: WeightRefusal | None = None,
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
            qparams, note = fit_weight(path, weight, spec, qparams, refusal)
            notes += [note] if note else []
            quantizers.setdefault(node.name, {})[name] = WeightQuantizer(qparams, enabled=False)
    return quantizers, notes
