"""A simulated graph in float, in which single quantizers are on: what does each alone cost?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxquant.metrics import first_tensor
from fxquant.simulate.nonlinear import SimulatedForm
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from passes import FusedLayer, copy_sharing_tensors
from passes.infra.listing import operation
from passes.layers.replace import bare_layer

__all__ = ["Alone"]

Key = TypeVar("Key")
Variants = Callable[[fx.Node], Iterable[tuple[Key, AbstractContextManager[None]]]]


class Alone:
    """A simulated graph, copied, with all its quantizers off.

    Operations compute in float whatever form they have; a corrected bias goes with its weight's
    quantizer. `fused` is the stage before. `graph` is the copy, `values` are its quantizers of
    values by path.
    """

    def __init__(self, fused: fx.GraphModule, simulated: fx.GraphModule) -> None:
        self.graph = copy_sharing_tensors(simulated)
        self.values: dict[str, ActivationQuantizer] = {}
        self._weights: list[WeightQuantizer] = []
        self._layers: list[tuple[FusedLayer, nn.Module, nn.Module]] = []
        for path, module in self.graph.named_modules():
            if isinstance(module, ActivationQuantizer):
                self.values[path] = module
            elif isinstance(module, WeightQuantizer):
                self._weights.append(module)
            elif isinstance(module, SimulatedForm):
                module.unlink()
            elif isinstance(module, FusedLayer):
                original: Any = fused.get_submodule(path)
                exact = bare_layer(original)
                self._layers.append((module, exact, module.layer))
        self.all_off()
        self._made_by = self._producers(fused)

    def all_off(self) -> None:
        """Compute in float."""
        self._switch(list(self.values.values()), True, False)

    def one_at_a_time(
        self, batch: tuple[Any, ...], variants: Variants[Key]
    ) -> Iterator[tuple[Key, Tensor]]:
        """The outputs under each variant of each node, in the order of the graph.

        `variants` gives for a node what is entered while everything from this node on is
        computed, with a key. What comes before a node is computed once.
        """
        runner = _Runner(self.graph, batch)
        for node in runner.nodes:
            for key, variant in variants(node):
                with variant:
                    yield key, runner.rest()
            runner.step()

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

        Yields the value's name, what makes it with its grid, and the outputs.
        """
        first_uses = self.first_uses(self.values)

        def variants(node: fx.Node) -> Iterator[tuple[str, AbstractContextManager[None]]]:
            if node in first_uses:
                yield first_uses[node], self._on([first_uses[node]], False)

        found: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for batch in tqdm(
                batches, "values", delay=2, disable=not progress, leave=False, unit="batch"
            ):
                for path, output in self.one_at_a_time(batch, variants):
                    found.setdefault(path, []).append(output)
        for path, outputs in found.items():
            detail = f"{self._made_by[path]}: {self.values[path].detail}"
            yield path.removeprefix("quantizers."), detail, torch.cat(outputs)

    def first_uses(self, paths: Iterable[str]) -> dict[fx.Node, str]:
        """The first node that calls each of these modules: a shared one goes on from there."""
        wanted, first_uses = set(paths), {}
        for node in self.graph.graph.nodes:
            if node.op == "call_module" and str(node.target) in wanted:
                wanted.discard(str(node.target))
                first_uses[node] = str(node.target)
        return first_uses

    def _producers(self, fused: fx.GraphModule) -> dict[str, str]:
        """What makes the first value of each quantizer, in the order of the graph."""
        before = {node.name: node for node in fused.graph.nodes}
        makers: dict[str, str] = {}
        for node, path in self.first_uses(self.values).items():
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
                module.layer = corrected if on else exact  # type: ignore[assignment]


class _Runner(fx.Interpreter):
    """Walks over a graph, and from where it stands computes the rest aside."""

    def __init__(self, graph: fx.GraphModule, batch: tuple[Any, ...]) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.nodes = list(graph.graph.nodes)
        self.position = 0
        self.args_iter = iter(batch)

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
