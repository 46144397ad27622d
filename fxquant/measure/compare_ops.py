"""What does each integer form cost? Softmax, GELU, layer norms and residuals, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxquant.arguments import checked
from fxquant.compile import compile
from fxquant.errors import CalibrationError, FxquantError, ModelError, RecipeError
from fxquant.frontend.inputs import arguments
from fxquant.measure.alone import Alone
from fxquant.measure.tables import decibels, finite, percent, table
from fxquant.metrics import Closeness, first_tensor
from fxquant.plan.operations import Kind, classify, is_curved
from fxquant.plan.residual import ResidualStream
from fxquant.recipe import Recipe
from fxquant.simulate.calibration_set import CalibrationSet

__all__ = ["FORMS", "OperationCost", "OperationCosts", "compare_ops"]

FORMS: dict[str, dict[str, Any]] = {
    "softmax table": {"softmax": "table"},
    "softmax i-vit, 8 bits": {"softmax": "i-vit", "softmax_bits": 8},
    "softmax i-vit, 16 bits": {"softmax": "i-vit", "softmax_bits": 16},
    "softmax log2": {"softmax": "log2"},
    "GELU table": {"gelu": "table"},
    "GELU i-vit": {"gelu": "i-vit"},
    "functions table": {"functions": "table"},
    "LayerNorm i-vit": {"layer_norm": "i-vit"},
    "LayerNorm integer": {"layer_norm": "integer"},
    "LayerNorm power of two": {"layer_norm": "power_of_two"},
    "residual 16 bits, LayerNorm integer": {"residual": 16, "layer_norm": "integer"},
    "residual 8 bits, LayerNorm integer": {"residual": 8, "layer_norm": "integer"},
}
"""The forms by name, as changes of the recipe's table of operations; the first key is what they
are about. Between layer norms in float a residual stream has no use for integers."""

BASELINE = "baseline: operations in float"
_FLOAT = ("softmax", "gelu", "functions", "layer_norm", "residual")


@dataclass(frozen=True)
class OperationCost:
    """What one replacement does to the network's output.

    Attributes:
        group: ``operation``, where the rest of the network is quantized already; ``quantizers``
            and ``value``, where everything else is float.
        name: what was replaced or quantized.
        sqnr_db: signal to noise against the float network, in decibels.
        agreement: share in [0, 1] of the images with the float network's argmax; None where the
            output is not [N, classes].
        cost_db: decibels below the baseline; None outside the operations.
        baseline_sqnr_db, baseline_agreement: the same figures with the baseline as reference.
        detail: what makes a single value, and its grid.
        error: why there are no figures, or "".
    """

    group: str
    name: str
    sqnr_db: float | None
    agreement: float | None
    cost_db: float | None = None
    baseline_sqnr_db: float | None = None
    baseline_agreement: float | None = None
    detail: str = ""
    error: str = ""


@dataclass(frozen=True)
class OperationCosts:
    """The rows, and what they were measured on.

    `images` for operations and groups of quantizers, `value_images` for single values.
    """

    rows: tuple[OperationCost, ...]
    recipe: str
    images: int
    value_images: int

    def of(self, group: str) -> tuple[OperationCost, ...]:
        """The rows of a group: ``operation``, ``quantizers`` or ``value``."""
        return tuple(row for row in self.rows if row.group == group)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; what is not finite is null."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain

    def __str__(self) -> str:
        operations = [
            (
                row.name,
                decibels(row.sqnr_db),
                percent(row.agreement),
                decibels(row.cost_db),
                decibels(row.baseline_sqnr_db),
                percent(row.baseline_agreement),
            )
            for row in self.of("operation")
            if not row.error
        ]
        headers = ("replaced", "SQNR", "agreement", "cost", "SQNR", "agreement")
        texts = [
            f"recipe {self.recipe}: SQNR and agreement against float on {self.images} images, "
            "what it costs, and both against the baseline",
            table(operations, headers),
            *(f"{row.name}: {row.error}" for row in self.rows if row.error),
        ]
        alone = [
            (row.name, decibels(row.sqnr_db), percent(row.agreement))
            for row in self.of("quantizers")
        ]
        if alone:
            texts += ["", "quantized, all else in float"]
            texts += [table(alone, ("quantized", "SQNR", "agreement"))]
        values = [
            (row.name, row.detail, decibels(row.sqnr_db), percent(row.agreement))
            for row in self.of("value")
        ]
        if values:
            texts += ["", f"the worst single values, on {self.value_images} images"]
            texts += [table(values, ("quantized", "grid", "SQNR", "agreement"), texts=2)]
        return "\n".join(texts)


@checked(model=ModelError, recipe=RecipeError, data=CalibrationError)
def compare_ops(
    model: nn.Module,
    recipe: Recipe | str,
    data: Any,
    *,
    calibration: Any = None,
    forms: Mapping[str, Mapping[str, Any]] | None = None,
    worst: int = 10,
    value_images: int = 16,
    progress: bool = False,
) -> OperationCosts:
    """Replace one operation at a time by each of its integer forms, and see the output change.

    The baseline is `recipe` with softmax, GELU, functions, layer norms and residuals in float.
    Each form is put in alone; then all that the recipe asks for. Afterwards, in the recipe's
    graph, the weights, the activations, what each kind of operation gives, and single values are
    quantized with everything else in float. All is measured in the simulated graph.

    Args:
        model: a float model in eval mode.
        recipe: the rest of the quantization; a name or a Recipe.
        data: batches to measure on, as for `compile`'s calibration; labels are ignored.
        calibration: batches to calibrate on; by default the recipe's own source, or else `data`.
        forms: changes of the table of operations by name; by default those of `FORMS` that the
            network has operations for.
        worst: how many single values are listed; 0 measures none.
        value_images: how many images single values are measured on.
        progress: show bars.

    Raises:
        FxquantError: as `compile` does for the baseline; a form's own error is in its row.
    """
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    data, calibration = _repeatable(data), _repeatable(calibration)
    if calibration is None and not recipe.calibration.source:
        calibration = data
    plain = _in_float(recipe)

    def graphs(settings: Recipe) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The fused and the simulated graph."""
        q = compile(model, settings, calibration=calibration, target="reference")
        return q.stages["fused"], q.stages["simulated"]

    fused, simulated = graphs(plain)
    batches = CalibrationSet(data, model=model)
    expected, baseline = _outputs(model, batches), _outputs(simulated, batches)
    rows = [_operation(BASELINE, expected, baseline, baseline)]
    if forms is None:
        present = _operations(fused)
        forms = {name: form for name, form in FORMS.items() if next(iter(form)) in present}
    settings = {name: _with(plain, form) for name, form in forms.items()}
    if recipe != plain:
        settings[f"all of {recipe.name}"] = recipe
    for name in tqdm(settings, "forms", delay=2, disable=not progress, leave=False, unit="form"):
        try:
            found = graphs(settings[name])
        except FxquantError as error:
            rows.append(OperationCost("operation", name, None, None, error=str(error)))
            continue
        rows.append(_operation(name, expected, baseline, _outputs(found[1], batches)))
        if settings[name] is recipe:
            fused, simulated = found
    alone = Alone(fused, simulated)
    for name, outputs in alone.groups(batches, progress=progress):
        rows.append(OperationCost("quantizers", name, *_closeness(expected, outputs)))
    few = CalibrationSet(data, model=model, images=value_images)
    if worst:
        expected = expected[:value_images]
        values = [
            OperationCost("value", name, *_closeness(expected, outputs), detail=detail)
            for name, detail, outputs in alone.values_alone(few, progress=progress)
        ]
        rows += sorted(values, key=lambda row: row.sqnr_db or 0.0)[:worst]
    return OperationCosts(tuple(rows), recipe.name, len(baseline), len(expected) if worst else 0)


def _in_float(recipe: Recipe) -> Recipe:
    """The recipe without any integer form, also where an override sets one."""
    overrides = [
        {key: value for key, value in override.to_dict().items() if key != "operations"}
        for override in recipe.overrides
    ]
    changes = {f"operations.{key}": "float" for key in _FLOAT}
    return recipe.replace({**changes, "requantization": "float", "overrides": overrides})


def _with(plain: Recipe, form: Mapping[str, Any]) -> Recipe:
    return plain.replace({f"operations.{key}": value for key, value in form.items()})


def _operations(fused: fx.GraphModule) -> set[str]:
    """The keys of a recipe's table of operations that an annotated fused graph has use for."""
    found = {"residual"} if ResidualStream(fused).additions else set()
    for node in fused.graph.nodes:
        kind = classify(node, fused).kind
        if kind is Kind.SOFTMAX:
            found.add("softmax")
        elif kind in (Kind.NORM, Kind.NORMALIZE):
            found.add("layer_norm")
        elif kind is Kind.TABLE and node.target is F.gelu:
            found.add("gelu")
        elif kind is Kind.TABLE and is_curved(node):
            found.add("functions")
    return found


def _repeatable(data: Any) -> Any:
    return list(data) if isinstance(data, Iterable) and iter(data) is data else data


def _outputs(model: nn.Module, batches: CalibrationSet) -> Tensor:
    """The outputs of all batches, one behind the other."""
    outputs = []
    with torch.no_grad():
        for batch in batches:
            positional, named = arguments(model, batches.names, batch)
            outputs.append(first_tensor(model(*positional, **named)))
    return torch.cat(outputs)


def _operation(name: str, expected: Tensor, baseline: Tensor, found: Tensor) -> OperationCost:
    sqnr, agreement = _closeness(expected, found)
    before, _ = _closeness(expected, baseline)
    if found is baseline:
        return OperationCost("operation", name, sqnr, agreement)
    cost = before - sqnr if math.isfinite(before) and math.isfinite(sqnr) else None
    return OperationCost("operation", name, sqnr, agreement, cost, *_closeness(baseline, found))


def _closeness(expected: Tensor, found: Tensor) -> tuple[float, float | None]:
    """SQNR in decibels, and the share of rows with the same argmax."""
    closeness = Closeness()
    closeness.add(expected, found)
    return closeness.sqnr_db, closeness.agreement
