"""One graph in which a single layer or value is quantized, and the error that it makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.compiled import CompiledModel
from fxquant.errors import CalibrationError, ModelError, RecipeError
from fxquant.plan.plan import Plan, make_plan
from fxquant.simulate.quantize_weights import weight_quantizers
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.spec import QuantSpec
from passes import FusedLayer, copy_sharing_tensors, module_path
from passes.infra.verify import flatten

__all__ = ["OneAtATime", "Runner", "Sums", "What", "first_tensor"]

What = Literal["weight", "activation"]


class Choices(nn.Module):
    """A value's quantizers for all bit widths; `active` says which one is on."""

    def __init__(self, quantizers: Mapping[int, ActivationQuantizer]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleDict({str(bits): q for bits, q in quantizers.items()})
        self.active = 0

    def forward(self, x: Tensor) -> Tensor:
        """x through the active quantizer, or as it is."""
        for quantizer in self.quantizers.values():
            if getattr(quantizer, "observing", False):
                quantizer(x)
        quantized: Tensor = self.quantizers[str(self.active)](x) if self.active else x
        return quantized


class OneAtATime:
    """One graph in float, in which a layer or a value at a time is quantized.

    `values`: the weights of each layer by path. `choices`: the values' quantizers, not calibrated
    yet. Raises RecipeError where the recipe quantizes nothing.
    """

    def __init__(self, q: CompiledModel, widths: Sequence[int], activations: bool) -> None:
        fused = q.stages["fused"]
        plan = make_plan(fused, q.recipe)
        self.graph = copy_sharing_tensors(q.stages["simulated"])
        self.values: dict[str, int] = {}
        self.choices: dict[str, Choices] = {}
        for path, module in list(self.graph.named_modules(remove_duplicate=False)):
            if isinstance(module, FusedLayer):
                # Biases may have been corrected for one quantization: the float ones count here.
                original = fused.get_submodule(path)
                fused_layer = isinstance(original, FusedLayer)
                module.layer = original.layer if fused_layer else original  # type: ignore[assignment]
                module.weight_quantizer = None
            elif isinstance(module, ActivationQuantizer):
                # An operation that executes integers on its grid computes in float without it.
                module.enabled = False
                new: nn.Module = nn.Identity()
                if activations:
                    new = self.choices[path] = Choices(
                        {
                            width: ActivationQuantizer(
                                replace(_at(module.spec, width)), channelwise=module.channelwise
                            )
                            for width in widths
                        }
                    )
                self.graph.set_submodule(path, new)
        self.weights = {width: _quantizers(fused, plan, width) for width in widths}
        if not any(self.weights.values()) and not self.choices:
            raise RecipeError(f"recipe {q.recipe.name} quantizes no layer: nothing to measure")
        self.widths = widths
        self.runner = Runner(self.graph)

    def float_output(self, batch: tuple[Any, ...]) -> Tensor:
        """What the float network gives."""
        return first_tensor(self.graph(*batch))

    def outputs(self, batch: tuple[Any, ...]) -> Iterator[tuple[tuple[str, What, int], Tensor]]:
        """The output with each layer alone at each bit width, in the order of the graph.

        The key is the path, "weight" or "activation", and the bit width.
        """
        runner, seen = self.runner, set()
        runner.start(batch)
        self.values.clear()
        for node in runner.nodes:
            if node.op == "call_module":
                path = str(node.target)
                module = self.graph.get_submodule(path)
                if isinstance(module, FusedLayer) and node.name in self.weights[self.widths[0]]:
                    # The parts of a layer that was split have its path.
                    before = self.values.get(module_path(node), 0)
                    self.values[module_path(node)] = before + _weight(module).numel()
                    for width in self.widths:
                        module.weight_quantizer = self.weights[width][node.name]
                        yield (module_path(node), "weight", width), runner.rest()
                        module.weight_quantizer = None
                elif isinstance(module, Choices) and path not in seen:
                    # Values that share a quantizer are quantized together, from the first on.
                    seen.add(path)
                    for width in self.widths:
                        module.active = width
                        name = path.removeprefix("quantizers.")
                        yield (name, "activation", width), runner.rest()
                        module.active = 0
            runner.step()


class Runner(fx.Interpreter):
    """Walks over a graph in float, and from where it stands computes the rest aside."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.nodes = list(graph.graph.nodes)

    def start(self, batch: tuple[Any, ...]) -> None:
        """Stand in front of the first node, with the arguments `batch`."""
        self.env = {}
        self.args_iter = iter(batch)
        self.position = 0

    def step(self) -> Any:
        """Run the next node; returns its value."""
        node = self.nodes[self.position]
        self.position += 1
        result = self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, ()):
            del self.env[dead]
        return result

    def rest(self) -> Tensor:
        """The output from here on, without moving."""
        values, position = dict(self.env), self.position
        result: Any = None
        while self.position < len(self.nodes):
            result = self.step()
        self.env, self.position = values, position
        return first_tensor(result)


class Sums:
    """Sums over the batches for one row."""

    def __init__(self) -> None:
        self.images = self.labelled = 0
        self.signal = self.noise = self.kl = self.loss = 0.0
        self.classifies = True

    def add(self, expected: Tensor, found: Tensor, labels: Tensor | None) -> None:
        """Take in a batch of outputs."""
        a, b = expected.double(), found.double()
        self.images += len(a) if a.dim() else 1
        self.signal += float(a.square().sum())
        self.noise += float((a - b).square().sum())
        self.classifies &= a.dim() == 2
        if not self.classifies:
            return
        wanted, got = a.log_softmax(1), b.log_softmax(1)
        self.kl += float(F.kl_div(got, wanted, reduction="sum", log_target=True))
        if labels is not None:
            labels = labels[: len(b)]
            if int(labels.min()) < 0 or int(labels.max()) >= b.shape[1]:
                raise CalibrationError(
                    f"labels lie between {int(labels.min())} and {int(labels.max())}, the model "
                    f"has {b.shape[1]} classes"
                )
            self.labelled += len(labels)
            self.loss += float(F.cross_entropy(b, labels, reduction="sum"))

    def result(self) -> tuple[float, float | None, float | None]:
        """SQNR in dB, KL and loss in nats; None for what does not apply."""
        sqnr = math.inf
        if self.noise:
            sqnr = 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        kl = max(0.0, self.kl) / self.images if self.classifies else None
        return sqnr, kl, self.loss / self.labelled if self.labelled else None


def _at(spec: QuantSpec, width: int) -> QuantSpec:
    return replace(spec, bits=width, reduce_range=spec.reduce_range and width > 2)


def _quantizers(fused: fx.GraphModule, plan: Plan, width: int) -> dict[str, nn.Module]:
    specs = {name: _at(spec, width) for name, spec in plan.weights.items()}
    quantizers, _ = weight_quantizers(fused, replace(plan, weights=specs), "reference")
    for quantizer in quantizers.values():
        assert isinstance(quantizer, WeightQuantizer)
        quantizer.enabled = True
    return quantizers


def _weight(module: FusedLayer) -> Tensor:
    layer: Any = module.layer
    weight: Tensor = layer.weight
    return weight


def first_tensor(output: Any) -> Tensor:
    """The first float tensor of an output. Raises ModelError where there is none."""
    for _, value in flatten(output):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ModelError("the model's output holds no float tensor to measure")
