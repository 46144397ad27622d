"""Tables of a post-training study: one model, many settings of a recipe, one row each.

The settings are data: see `fxquant.measure.studies`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.artifact.packing import tensor_bytes
from fxquant.compile import compile
from fxquant.compiled import CompiledModel
from fxquant.data import ImageBatches
from fxquant.errors import CalibrationError, FxquantError, RecipeError, nearest
from fxquant.measure.benchmark import Machine, benchmark
from fxquant.measure.evaluate import collect_logits, evaluate
from fxquant.measure.studies import COLUMNS, STUDIES, Setting
from fxquant.measure.sweep_rows import FinishedRows, SweepRow, digest
from fxquant.measure.tables import table
from fxquant.metrics import Batch, labels_of
from fxquant.qat.finetune import finetune
from fxquant.recipe import Recipe
from fxquant.reconstruct.parallel import Share, computing_alone

LATENCY_ROUNDS = 5


@dataclass(frozen=True)
class Sweep:
    """The rows of one study; the float model's comes first."""

    study: str
    recipe: str
    target: str
    rows: tuple[SweepRow, ...]
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """The study, ready for ``json.dumps``."""
        return asdict(self) | {
            "rows": [row.to_json() for row in self.rows],
            "machine": asdict(self.machine),
        }

    def __str__(self) -> str:
        columns = COLUMNS.get(self.study, {})
        figures = ("loss", "float top-1", "top-1", "agreement", "SQNR", "size", "latency")
        rows = [row.cells(columns.values()) for row in self.rows if row.evaluation]
        failures = [f"{row.name}: {row.error}" for row in self.rows if row.error]
        about = f"recipe {self.recipe}, target {self.target}; {self.machine}"
        shown = table(rows, (self.study, *columns, *figures))
        return "\n".join([shown, *failures, about])


def sweep(
    study: str,
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Iterable[Batch] | Tensor,
    evaluation: Iterable[Batch],
    target: str = "x86",
    select: Sequence[str] = (),
    limit: int | None = None,
    training: Iterable[Batch] | None = None,
    epochs: int = 10,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Sweep:
    """Compile and measure `model` with every setting of a study.

    Under torchrun every process computes its share of the rows, and all return the same sweep.

    Args:
        study: a key of `STUDIES`.
        model: a float classifier in eval mode.
        recipe: what the settings change.
        calibration: batches that can be iterated again and again, or one tensor.
        evaluation: ``(images, labels)`` batches that can be iterated again and again.
        target: what every setting is compiled for.
        select: globs on the names of settings; those that any of them matches are run. None: all.
        limit: the most settings to run, the first ones.
        training: batches to finetune on, where a study does; None: those of the calibration.
            Without labels only the float network teaches. `ImageBatches` are shuffled, others
            come as they are.
        epochs: of finetuning.
        device: where roundings are learned and networks are finetuned.
        checkpoint: a folder that keeps every finished row; a sweep that was interrupted goes on
            behind those that are there.
        progress: show a bar and each row on stderr.

    Raises:
        ArtifactError: `checkpoint` holds rows of something else.
        RecipeError: there is no such study, or a glob matches no setting.
        CalibrationError: there are no calibration images.
        FxquantError: the first setting's error, where every setting failed. Where some did, their
            rows carry the error instead.
    """
    if study not in STUDIES:
        raise RecipeError(
            f"there is no study {study!r}; there are {', '.join(STUDIES)}{nearest(study, STUDIES)}"
        )
    settings = _selected(STUDIES[study](model), select)[:limit]
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    total = _count(batches)
    logits = collect_logits(model, evaluation, progress=progress)
    image = _first_image(evaluation)
    failed: list[FxquantError] = []

    def measure(setting: Setting) -> SweepRow:
        images = max(1, round(total * setting.calibration_share))
        taken = _FirstImages(batches, images)
        try:
            compiled = compile(
                model,
                _changed(recipe, setting),
                calibration=_noise(taken) if setting.noise else taken,
                target=target,
                device=device,
            )
            if setting.finetune is not None:
                compiled = _finetuned(
                    compiled,
                    batches if training is None else training,
                    {"epochs": epochs, "device": device, **setting.finetune},
                )
            return SweepRow(
                setting.name,
                setting.changes,
                images,
                evaluate(compiled, evaluation, reference=logits),
                tensor_bytes(compiled.stages["integer"]),
                _latency(compiled, image),
            )
        except FxquantError as error:
            failed.append(error)
            return SweepRow(setting.name, setting.changes, images, None, None, None, str(error))

    done = FinishedRows(
        None if checkpoint is None else Path(checkpoint),
        digest(model, (batches, evaluation), study, recipe, target, total, epochs),
    )
    share = Share.of_this_process()
    own: dict[int, SweepRow] = {}
    with computing_alone():
        if (float_row := done.get("float")) is None:
            float_row = _float_row(model, evaluation, logits, image)
            done.add(float_row)
        mine = list(enumerate(settings))[share.rank :: share.size]
        for index, setting in tqdm(mine, study, delay=2, disable=not progress, unit="setting"):
            row = done.get(setting.name)
            if row is None:
                row = measure(setting)
                done.add(row)
            own[index] = row
            if progress:
                # A study takes hours: what is done is shown before the end.
                tqdm.write("  ".join(row.cells()), file=sys.stderr)
    found = {index: row for part in share.gather(own) for index, row in part.items()}
    rows = [found[index] for index in range(len(settings))]
    if failed and all(row.error for row in rows):
        raise failed[0]
    return Sweep(study, recipe.name, target, (float_row, *rows), Machine.here())


def _selected(settings: Sequence[Setting], select: Sequence[str]) -> list[Setting]:
    names = [setting.name for setting in settings]
    for pattern in select:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"{pattern!r} matches no row of the study; there are {len(names)}, such as "
                f"{names[0]!r} and {names[-1]!r}{nearest(pattern, names)}"
            )
    return [
        setting
        for setting in settings
        if not select or any(fnmatchcase(setting.name, pattern) for pattern in select)
    ]


def _changed(recipe: Recipe, setting: Setting) -> Recipe:
    changed = recipe.replace({**setting.changes, "calibration.images": 0})
    if not setting.overrides:
        return changed
    return changed.replace({"overrides": [*changed.overrides, *setting.overrides]})


def _finetuned(
    compiled: CompiledModel, batches: Iterable[Batch], options: Mapping[str, Any]
) -> CompiledModel:
    loss = None if labels_of(next(iter(batches))) is None else F.cross_entropy
    loader = _Shuffled(batches) if isinstance(batches, ImageBatches) else batches
    return finetune(compiled, loader, loss=loss, **options)


def _float_row(
    model: nn.Module, evaluation: Iterable[Batch], logits: Sequence[Tensor], image: Tensor
) -> SweepRow:
    replayed = iter(logits)
    reached = evaluate(lambda _: next(replayed), evaluation)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return SweepRow("float", {}, 0, reached, size, _latency(model, image))


def _latency(model: Callable[[Tensor], Any], image: Tensor) -> float:
    return benchmark({"model": model}, image, rounds=LATENCY_ROUNDS).timings[0].median_ms


def _first_image(batches: Iterable[Batch]) -> Tensor:
    batch = next(iter(batches))
    images: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return images[:1].contiguous()


def _count(batches: Iterable[Batch]) -> int:
    known = getattr(batches, "images", None)
    images = len(known) if known is not None else sum(len(each) for each in _images(batches))
    if not images:
        raise CalibrationError("there are no calibration images")
    return images


def _images(batches: Iterable[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch if isinstance(batch, Tensor) else batch[0]


def _noise(batches: Iterable[Tensor]) -> list[Tensor]:
    """Normal noise, seeded, of the batches' shapes, and of their channels' mean and deviation."""
    real = list(batches)
    values = torch.cat([batch.transpose(0, 1).flatten(1) for batch in real], 1)
    shape = (1, -1, *[1] * (real[0].dim() - 2))
    mean, deviation = values.mean(1).view(shape), values.std(1).view(shape)
    chance = torch.Generator().manual_seed(0)
    return [torch.randn(batch.shape, generator=chance) * deviation + mean for batch in real]


class _Shuffled:
    """Batches of the same images, in another order each time; drawn from torch's generator.

    Sorted by class, as they lie in folders, they would train one class after the other.
    """

    def __init__(self, batches: ImageBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        images = self.batches.images
        order = torch.randperm(len(images)).tolist()
        shuffled = replace(
            images,
            names=tuple(images.names[index] for index in order),
            labels=images.labels and tuple(images.labels[index] for index in order),
            pixels=None if images.pixels is None else images.pixels[order],
        )
        yield from ImageBatches(
            shuffled, self.batches.preprocessing, batch_size=self.batches.batch_size
        )


class _FirstImages:
    """The first images of some batches, as batches; iterable again and again."""

    def __init__(self, batches: Iterable[Batch], count: int) -> None:
        self.batches = batches
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        left = self.count
        for images in _images(self.batches):
            yield images[:left]
            left -= min(left, len(images))
            if not left:
                return
