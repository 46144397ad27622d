"""A float graph in which one layer or value at a time is quantized, at several bit widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, fx, nn

from fxquant.compiled import CompiledModel
from fxquant.errors import RecipeError
from fxquant.measure.alone import Alone
from fxquant.plan.plan import Plan, make_plan
from fxquant.recipe import Override, Recipe
from fxquant.simulate.calibrate import calibrate
from fxquant.simulate.calibration_set import CalibrationSet
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.simulate.weight_quantizers import weight_quantizers
from fxquant.spec import QuantSpec
from passes import FusedLayer, module_path

__all__ = ["What", "Widths"]

What = Literal["weight", "activation"]
Key = tuple[str, What, int]


class Widths(Alone):
    """The layers of a compiled model, and its values if wanted, each at all bit widths.

    `sizes`: how many weights each layer has, by path. `choices`: the values' quantizers, not
    calibrated yet. Raises RecipeError where the recipe quantizes nothing.
    """

    def __init__(self, q: CompiledModel, widths: Sequence[int], *, activations: bool) -> None:
        fused = q.stages["fused"]
        super().__init__(fused, q.stages["simulated"])
        plan = q.plan
        assert plan is not None
        self._weights_at = {width: _quantizers(fused, plan, q.recipe, width) for width in widths}
        self.choices: dict[str, _Choices] = {}
        for path, module in self.values.items() if activations else ():
            self.choices[path] = _Choices(module, widths)
            self.graph.set_submodule(path, self.choices[path])
        if not any(self._weights_at.values()) and not self.choices:
            raise RecipeError(f"recipe {q.recipe.name} quantizes no layer: nothing to measure")
        self.sizes: dict[str, int] = {}
        self._layer_of: dict[fx.Node, FusedLayer] = {}
        for node in self.graph.graph.nodes:
            if node.op == "call_module" and node.name in self._weights_at[widths[0]]:
                layer: Any = self.graph.get_submodule(str(node.target))
                self._layer_of[node] = layer
                # The parts of a layer that was split have its path.
                before = self.sizes.get(module_path(node), 0)
                self.sizes[module_path(node)] = before + layer.layer.weight.numel()
        self._first_uses = self.first_uses(self.choices)

    def calibrate(self, inputs: CalibrationSet, *, progress: bool = False) -> None:
        """Find the grids of `choices` on `inputs`; afterwards everything is off again."""
        calibrate(self.graph, inputs, batches=inputs.batches, progress=progress)
        self.all_off()

    def outputs(self, batch: tuple[Any, ...]) -> Iterator[tuple[Key, Tensor]]:
        """The output with each layer and value alone at each bit width, in the graph's order.

        The key is the path, "weight" or "activation", and the bit width.
        """
        return self.one_at_a_time(batch, self._variants)

    def _variants(self, node: fx.Node) -> Iterator[tuple[Key, AbstractContextManager[None]]]:
        for width, quantizers in self._weights_at.items():
            if node in self._layer_of:
                variant = _with_weights(self._layer_of[node], quantizers[node.name])
                yield (module_path(node), "weight", width), variant
            elif node in self._first_uses:
                path = self._first_uses[node]
                variant = self.choices[path].at(width)
                yield (path.removeprefix("quantizers."), "activation", width), variant


class _Choices(nn.Module):
    """A value's quantizers for all bit widths, of which one or none is on."""

    def __init__(self, like: ActivationQuantizer, widths: Sequence[int]) -> None:
        super().__init__()
        self.quantizers: Mapping[str, nn.Module] = nn.ModuleDict(  # type: ignore[assignment]
            {
                str(width): ActivationQuantizer(_at(like.spec, width), channelwise=like.channelwise)
                for width in widths
            }
        )
        self.active = 0

    def forward(self, x: Tensor) -> Tensor:
        """x through the active quantizer, or as it is."""
        for quantizer in self.quantizers.values():
            if getattr(quantizer, "observing", False):
                quantizer(x)
        quantized: Tensor = self.quantizers[str(self.active)](x) if self.active else x
        return quantized

    @contextmanager
    def at(self, width: int) -> Iterator[None]:
        """Quantize in `width` bits."""
        self.active = width
        try:
            yield
        finally:
            self.active = 0


@contextmanager
def _with_weights(layer: FusedLayer, quantizer: nn.Module) -> Iterator[None]:
    off, layer.weight_quantizer = layer.weight_quantizer, quantizer
    try:
        yield
    finally:
        layer.weight_quantizer = off


def _at(spec: QuantSpec, width: int) -> QuantSpec:
    return replace(spec, bits=width, reduce_range=spec.reduce_range and width > 2)


def _quantizers(
    fused: fx.GraphModule, plan: Plan, recipe: Recipe, width: int
) -> dict[str, nn.Module]:
    # As the recipe has weights of that width: its grids may differ in more than the bits.
    changes: dict[str, Any] = {"bits": width, **({"reduce_range": False} if width == 2 else {})}
    everywhere = Override(regex=".*", weights=tuple(changes.items()))
    wide = make_plan(fused, replace(recipe, overrides=(*recipe.overrides, everywhere)))
    specs = {name: spec for name, spec in wide.weights.items() if name in plan.weights}
    quantizers, _ = weight_quantizers(fused, replace(plan, weights=specs))
    for quantizer in quantizers.values():
        assert isinstance(quantizer, WeightQuantizer)
        quantizer.enabled = True
    return quantizers
