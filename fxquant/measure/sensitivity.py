"""What each layer alone costs at each bit width: the table that mixed precision starts from."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.arguments import checked
from fxquant.compile import compile
from fxquant.compiled import CompiledModel
from fxquant.errors import CalibrationError, FxquantError, ModelError, RecipeError
from fxquant.measure.tables import finite, table
from fxquant.measure.widths import What, Widths
from fxquant.metrics import Closeness, first_tensor, labels_of, outputs_of
from fxquant.recipe import Recipe
from fxquant.simulate.calibration_set import CalibrationSet

__all__ = ["Effect", "Sensitivity", "measure"]

_KINDS: tuple[What, ...] = ("weight", "activation")


@dataclass(frozen=True)
class Effect:
    """What one layer's weight, or one value, in `bits` does to the network's output.

    Attributes:
        path: the layer's module path, or the value's name in the graph.
        what: ``weight`` or ``activation``.
        bits: the bit width; everything else stays float.
        values: how many weights the layer has; 0 for an activation.
        sqnr_db: signal to noise of the output in decibels; infinite where nothing changes.
        kl: mean Kullback-Leibler divergence of the softmax in nats, from the float network's;
            None where the output is not [N, classes].
        loss: mean cross entropy in nats; None without labels.
    """

    path: str
    what: What
    bits: int
    values: int
    sqnr_db: float
    kl: float | None
    loss: float | None


@dataclass(frozen=True)
class Sensitivity:
    """All effects in the order of the graph, and what they were measured on."""

    rows: tuple[Effect, ...]
    recipe: str
    images: int
    float_loss: float | None = None

    @property
    def bits(self) -> tuple[int, ...]:
        """The bit widths that were measured, ascending."""
        return tuple(sorted({row.bits for row in self.rows}))

    def of(self, what: What) -> dict[str, dict[int, Effect]]:
        """The effects of weights, or of activations, by path and by bit width."""
        effects: dict[str, dict[int, Effect]] = {}
        for row in self.rows:
            if row.what == what:
                effects.setdefault(row.path, {})[row.bits] = row
        return effects

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; an infinite SQNR is null."""
        return {
            "recipe": self.recipe,
            "images": self.images,
            "float_loss": self.float_loss,
            "rows": finite([asdict(row) for row in self.rows]),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivity:
        """What `to_json` gave."""
        rows = [
            Effect(**{**row, "sqnr_db": math.inf if row["sqnr_db"] is None else row["sqnr_db"]})
            for row in data["rows"]
        ]
        return cls(tuple(rows), data["recipe"], data["images"], data["float_loss"])

    def __str__(self) -> str:
        bits = self.bits
        lines = []
        for what in _KINDS:
            for path, effects in self.of(what).items():
                shown = [effects.get(width) for width in bits]
                values = next(iter(effects.values())).values
                line = [what, path, values or ""]
                line += ["-" if row is None else f"{row.sqnr_db:.1f}" for row in shown]
                line += ["-" if row is None or row.kl is None else f"{row.kl:.2e}" for row in shown]
                lines.append(line)
        headers = ["", "alone", "weights"]
        headers += [f"SQNR {width} bit" for width in bits] + [f"KL {width} bit" for width in bits]
        loss = "" if self.float_loss is None else f", float loss {self.float_loss:.4f}"
        about = f"{self.images} images, recipe {self.recipe}{loss}; SQNR in dB, KL in nats"
        return f"{table(lines, headers, texts=2)}\n{about}"

    def plot(self, path: str | Path) -> None:
        """Draw SQNR and KL over the layers into a file, whose suffix says the format.

        Raises:
            FxquantError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            figure_type = importlib.import_module("matplotlib.figure").Figure
        except ImportError as error:
            raise FxquantError(
                "plots need matplotlib: install it with pip install 'fxquant[plots]'"
            ) from error
        kinds = [what for what in _KINDS if self.of(what)]
        longest = max((len(self.of(what)) for what in kinds), default=1)
        size = (max(6.0, 0.28 * longest + 2), 4.5 * len(kinds))
        figure = figure_type(figsize=size, layout="constrained")
        axes = figure.subplots(len(kinds), 2, squeeze=False)
        for (left, right), what in zip(axes, kinds, strict=True):
            self._draw(left, right, what)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise FxquantError(f"{path}: the plot cannot be written: {error}") from error

    def _draw(self, left: Any, right: Any, what: What) -> None:
        effects_of = self.of(what)
        for width in self.bits:
            rows = [effects.get(width) for effects in effects_of.values()]
            sqnr = [math.nan if row is None else row.sqnr_db for row in rows]
            kl = [math.nan if row is None or not row.kl else row.kl for row in rows]
            left.plot(sqnr, marker="o", markersize=3, label=f"{width} bit")
            right.plot(kl, marker="o", markersize=3, label=f"{width} bit")
        left.set_ylabel("output SQNR, dB")
        right.set_ylabel("KL from float, nats")
        right.set_yscale("log")
        for axis in (left, right):
            axis.set_title(f"one {what} at a time")
            axis.set_xticks(range(len(effects_of)), list(effects_of), rotation=90, fontsize=6)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)


@checked(but=("bits",), model=ModelError, recipe=RecipeError)
def measure(
    model: nn.Module | CompiledModel,
    recipe: Recipe | str,
    data: Any,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    activations: bool = False,
    images: int | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Quantize one layer's weight at a time, everything else in float, and see the output change.

    Weights are rounded to nearest on the grids that `recipe` finds at each bit width, without
    bias correction. One simulated graph serves all measurements: quantizers are put in and out,
    and only what follows the layer is computed again.

    Args:
        model: a float model in eval mode, or a compiled one (whose own float network and recipe
            then count, not `recipe`).
        recipe: which layers take part, and how their grids are found.
        data: batches of inputs, also ``(inputs..., labels)``; labels give the loss.
        bits: the bit widths, 2 to 8.
        activations: measure each quantized value as well, at the same bit widths.
        images: how many images are used at most.
        progress: show bars.

    Raises:
        ModelError: a loaded artefact, which holds no float network.
        RecipeError: a bit width is no bit width, or nothing is quantized.
        CalibrationError: the data are empty or of the wrong form.
    """
    whole = isinstance(bits, Sequence) and all(type(width) is int for width in bits)
    widths = sorted(set(bits)) if whole else []
    if not widths or widths[0] < 2 or widths[-1] > 8:
        raise RecipeError(f"bit widths are integers between 2 and 8, got {bits!r}")
    if isinstance(data, Iterable) and iter(data) is data:
        data = list(data)
    if isinstance(model, nn.Module) and not isinstance(model, CompiledModel):
        recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
        plain = recipe.replace({"bias_correction": False, "reconstruction.method": "none"})
        model = compile(model, plain, calibration=data, target="reference", progress=progress)
    if "simulated" not in model.stages:
        raise ModelError(
            "a loaded artefact holds no float network to measure: give the float model instead"
        )
    graph = Widths(model, widths, activations=activations)
    inputs = CalibrationSet(data, model=model.stages["fused"], images=images, names=model.names)
    if graph.choices:
        graph.calibrate(inputs, progress=progress)
    sums: dict[tuple[str, What, int], _Sums] = {}
    total = _Sums()
    labels = _labels(data, len(model.example))
    bar = tqdm(
        inputs,
        desc="sensitivity",
        total=inputs.batches,
        delay=2,
        disable=not progress,
        unit="batch",
    )
    with torch.no_grad():
        for batch in bar:
            label = next(labels, None)
            expected = first_tensor(outputs_of(graph.graph, *batch))
            total.add(expected, expected, label)
            for key, found in graph.outputs(batch):
                sums.setdefault(key, _Sums()).add(expected, found, label)
    rows = [
        Effect(path, what, width, graph.sizes[path] if what == "weight" else 0, *entry.result())
        for (path, what, width), entry in sums.items()
    ]
    return Sensitivity(tuple(rows), model.recipe.name, total.images, total.result()[2])


class _Sums:
    """Sums over the batches for one row."""

    def __init__(self) -> None:
        self.images = self.labelled = 0
        self.closeness = Closeness()
        self.kl = self.loss = 0.0

    def add(self, expected: Tensor, found: Tensor, labels: Tensor | None) -> None:
        """Take in a batch of outputs."""
        self.images += len(expected) if expected.dim() else 1
        self.closeness.add(expected, found)
        if not self.closeness.classifies:
            return
        logits = found.double()
        wanted, got = expected.double().log_softmax(1), logits.log_softmax(1)
        self.kl += float(F.kl_div(got, wanted, reduction="sum", log_target=True))
        if labels is not None:
            labels = labels[: len(logits)]
            if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
                raise CalibrationError(
                    f"labels lie between {int(labels.min())} and {int(labels.max())}, the model "
                    f"has {logits.shape[1]} classes"
                )
            self.labelled += len(labels)
            self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))

    def result(self) -> tuple[float, float | None, float | None]:
        """SQNR in dB, KL and loss in nats; None for what does not apply."""
        kl = max(0.0, self.kl) / self.images if self.closeness.classifies else None
        return self.closeness.sqnr_db, kl, self.loss / self.labelled if self.labelled else None


def _labels(data: Any, inputs: int) -> Iterator[Tensor | None]:
    """The class labels behind the inputs of each batch, where there are any."""
    for batch in () if isinstance(data, Tensor) else data:
        labels = labels_of(batch, inputs)
        usable = isinstance(labels, Tensor) and labels.dim() == 1 and len(labels)
        yield labels if usable and not labels.is_floating_point() else None
