"""Quantizers of a simulated graph on their own: some are on, everything else is float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from fxquant.measure.one_at_a_time import Runner, first_tensor
from fxquant.simulate.nonlinear import SimulatedForm
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from passes import FusedLayer, copy_sharing_tensors
from passes.infra.listing import operation

__all__ = ["Alone"]


class Alone:
    """A calibrated simulated graph, copied, with all its quantizers off.

    Operations compute in float whatever form they have; a corrected bias goes with its weight's
    quantizer. `fused` is the stage before.
    """

    def __init__(self, fused: fx.GraphModule, simulated: fx.GraphModule) -> None:
        self.graph = copy_sharing_tensors(simulated)
        self.values: dict[str, ActivationQuantizer] = {}
        self._weights: list[WeightQuantizer] = []
        self._layers: list[tuple[FusedLayer, Any, Any]] = []
        for path, module in self.graph.named_modules():
            if isinstance(module, ActivationQuantizer):
                self.values[path] = module
                module.enabled = False
            elif isinstance(module, WeightQuantizer):
                self._weights.append(module)
                module.enabled = False
            elif isinstance(module, SimulatedForm):
                module.__dict__["source"] = None
            elif isinstance(module, FusedLayer):
                original: Any = fused.get_submodule(path)
                exact = original.layer if isinstance(original, FusedLayer) else original
                self._layers.append((module, exact, module.layer))
                module.layer = exact
        self._made_by = self._producers(fused)

    def groups(
        self, batches: Iterable[tuple[Any, ...]], *, progress: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """The outputs with the weights on, with the activations on, and by what makes a value."""
        settings: list[tuple[str, list[str], bool]] = []
        if self._weights:
            settings.append((f"weights ({len(self._weights)})", [], True))
        if self.values:
            settings.append((f"activations ({len(self.values)})", list(self.values), False))
        kinds: dict[str, list[str]] = {}
        for path, maker in self._made_by.items():
            kinds.setdefault(maker, []).append(path)
        for maker, paths in kinds.items():
            settings.append((f"{maker} values ({len(paths)})", paths, False))
        for name, paths, weights in tqdm(
            settings, "quantizers", delay=2, disable=not progress, leave=False, unit="group"
        ):
            with self._on(paths, weights), torch.no_grad():
                yield name, torch.cat([first_tensor(self.graph(*batch)) for batch in batches])

    def values_alone(
        self, batches: Iterable[tuple[Any, ...]], *, progress: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        """The outputs with one value quantized; those that share a quantizer go together.

        Yields the value's name, what makes it with its grid, and the outputs. What comes before a
        value is computed once for a batch.
        """
        runner = Runner(self.graph)
        found: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for batch in tqdm(
                batches, "values", delay=2, disable=not progress, leave=False, unit="batch"
            ):
                runner.start(batch)
                seen = set()
                for node in runner.nodes:
                    path = str(node.target)
                    if node.op == "call_module" and path in self.values and path not in seen:
                        seen.add(path)
                        with self._on([path], False):
                            found.setdefault(path, []).append(runner.rest())
                    runner.step()
        for path, outputs in found.items():
            detail = f"{self._made_by[path]}: {self.values[path].detail}"
            yield path.removeprefix("quantizers."), detail, torch.cat(outputs)

    def _producers(self, fused: fx.GraphModule) -> dict[str, str]:
        """What makes the first value of each quantizer, in the order of the graph."""
        before = {node.name: node for node in fused.graph.nodes}
        makers: dict[str, str] = {}
        for node in self.graph.graph.nodes:
            path = str(node.target)
            if node.op == "call_module" and path in self.values and path not in makers:
                source = node.all_input_nodes[0]
                makers[path] = operation(before.get(source.name, source))
        return makers

    @contextmanager
    def _on(self, paths: Iterable[str], weights: bool) -> Iterator[None]:
        quantizers = [self.values[path] for path in paths]
        self._switch(quantizers, weights, True)
        try:
            yield
        finally:
            self._switch(quantizers, weights, False)

    def _switch(self, quantizers: list[ActivationQuantizer], weights: bool, on: bool) -> None:
        for quantizer in (*quantizers, *(self._weights if weights else ())):
            quantizer.enabled = on
        if weights:
            for module, exact, corrected in self._layers:
                module.layer = corrected if on else exact
