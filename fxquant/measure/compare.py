"""Layer-wise error of weights and activations: where does the quality go?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from fxquant.backends import find_target
from fxquant.errors import ModelError
from fxquant.measure.tables import finite
from fxquant.metrics import Closeness
from fxquant.simulate.quantizers import WeightQuantizer
from passes import FusedLayer

if TYPE_CHECKING:
    from fxquant.backends import find_target
from fxquant.compiled import CompiledModel

__all__ = ["Comparison", "Difference", "compare", "difference"]


@dataclass(frozen=True)
class Difference:
    """A quantized tensor against the float one: SQNR in dB, MSE, cosine, largest error."""

    name: str
    what: str
    sqnr_db: float
    mse: float
    cosine: float
    max_error: float


@dataclass(frozen=True)
class Comparison:
    """Weights and biases layer by layer, activations value by value, and the outputs."""

    rows: tuple[Difference, ...]

    def worst(self, count: int = 10) -> tuple[Difference, ...]:
        """The rows with the lowest SQNR."""
        return tuple(sorted(self.rows, key=lambda row: row.sqnr_db)[:count])

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, one entry a row; an exact tensor's SQNR is null."""
        rows: list[dict[str, Any]] = finite([asdict(row) for row in self.rows])
        return rows

    def __str__(self) -> str:
        rows = [
            (
                row.what,
                row.name,
                f"{row.sqnr_db:.1f}",
                f"{row.mse:.3g}",
                f"{row.cosine:.5f}",
                f"{row.max_error:.3g}",
            )
            for row in self.rows
        ]
        return tabulate(rows, ("what", "name", "SQNR dB", "MSE", "cosine", "max error"))


def difference(name: str, what: str, expected: Tensor, found: Tensor) -> Difference:
    """The error of `found` against `expected`, both of one shape."""
    a, b = expected.detach().double().flatten(), found.detach().double().flatten()
    closeness = Closeness()
    closeness.add(a, b)
    norms = float(a.norm() * b.norm())
    return Difference(
        name,
        what,
        closeness.sqnr_db,
        closeness.noise / max(1, a.numel()),
        float(a @ b) / norms if norms else float(closeness.noise == 0),
        float((a - b).abs().max()) if a.numel() else 0.0,
    )


class _Values(fx.Interpreter):
    """Runs a graph and keeps every float value, and the real value of every integer one."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.values: dict[str, Tensor] = {}
        self.integers: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point() and not result.is_quantized:
            self.values[n.name] = result
        grid = n.meta.get("grid")
        if isinstance(result, Tensor) and grid is not None:
            plain = result.int_repr() if result.is_quantized else result
            scale = n.meta.get("channel_scale", grid.scale)
            if isinstance(scale, Tensor):
                scale = scale.view(-1, *[1] * (plain.dim() - 2))
            steps = plain.float() - grid.zero_point
            self.integers[n.meta.get("simulated", n.name)] = scale * steps
        return result


def compare(compiled: CompiledModel, inputs: Tensor | Sequence[Tensor]) -> Comparison:
    """Compare what runs with the fused float graph, on `inputs`, value by value.

    Errors accumulate: a value's row holds its own rounding and that of all before it. Needs the
    stages of a compile; a loaded artefact has no float graph (ModelError says so).
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if "fused" not in compiled.stages:
        raise ModelError(
            "a loaded artefact holds no float graph to compare with: compile the model instead"
        )
    fused, simulated = compiled.stages["fused"], compiled.stages["simulated"]
    rows = []
    for name, module in simulated.named_modules():
        if isinstance(module, FusedLayer) and isinstance(module.weight_quantizer, WeightQuantizer):
            weight: Any = module.layer.weight
            quantized = module.weight_quantizer(weight)
            rows.append(difference(name, "weight", weight, quantized))
            if (bias := _bias(compiled.stages["integer"], name)) is not None:
                rows.append(difference(name, "bias", module.layer.bias, bias))  # type: ignore[arg-type]
    with torch.no_grad():
        # An exact target computes the integer graph's values, whatever its own graph shows.
        exact = find_target(compiled.target).tolerance == 0
        stage = compiled.stages["integer" if exact else compiled.target]
        expected, found = _Values(fused), _Values(stage)
        float_output, output = expected.run(*arguments), found.run(*arguments)
    for name, value in expected.values.items():
        got = found.integers.get(name)
        if got is not None and got.shape == value.shape:
            rows.append(difference(name, "activation", value, got))
    if isinstance(output, Tensor):
        rows.append(difference("output", "output", float_output, output))
    return Comparison(tuple(rows))


def _bias(integer: fx.GraphModule, path: str) -> Tensor | None:
    """What the integers of a layer's bias stand for, or None where it has none."""
    for node in integer.graph.nodes:
        if node.op == "get_attr" and node.target == f"{path}.bias":
            scale: Tensor = node.meta["channel_scale"]
            return integer.get_buffer(str(node.target)) * scale
    return None
