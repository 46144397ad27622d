"""Layer-wise error of weights and activations: where does the quality go?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from torch import Tensor

from fxquant.arguments import checked
from fxquant.backends import find_target
from fxquant.compiled import CompiledModel
from fxquant.errors import ModelError
from fxquant.measure.tables import finite
from fxquant.metrics import Closeness
from fxquant.report.values import real_bias, run_both
from fxquant.simulate.quantizers import WeightQuantizer
from passes import FusedLayer

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


@checked()
def compare(compiled: CompiledModel, inputs: Tensor | Sequence[Tensor]) -> Comparison:
    """Compare what runs with the fused float graph, on `inputs`, value by value.

    Errors accumulate: a value's row holds its own rounding and that of all before it. Needs the
    stages of a compile; a loaded artefact has no float graph (ModelError says so).
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    compiled(*arguments)  # says what is wrong with them
    if "fused" not in compiled.stages:
        raise ModelError(
            "a loaded artefact holds no float graph to compare with: compile the model instead"
        )
    simulated = compiled.stages["simulated"]
    rows = []
    for name, module in simulated.named_modules():
        if isinstance(module, FusedLayer) and isinstance(module.weight_quantizer, WeightQuantizer):
            weight: Any = module.layer.weight
            quantized = module.weight_quantizer(weight)
            rows.append(difference(name, "weight", weight, quantized))
            if (bias := real_bias(compiled.stages["integer"], name)) is not None:
                rows.append(difference(name, "bias", module.layer.bias, bias))  # type: ignore[arg-type]
    exact = find_target(compiled.target).tolerance == 0
    runs = compiled.stages["integer" if exact else compiled.target]
    expected, found = run_both(compiled.stages["fused"], runs, arguments)
    for name, value in expected.items():
        got = found.get(name)
        if name != "output" and got is not None and got.shape == value.shape:
            rows.append(difference(name, "activation", value, got))
    if "output" in found:
        rows.append(difference("output", "output", expected["output"], found["output"]))
    return Comparison(tuple(rows))
