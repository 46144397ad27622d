"""A row of a sweep: what one setting reached, and the folder that keeps rows which are done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.errors import ArtifactError
from fxquant.measure.evaluate import Evaluation
from fxquant.measure.tables import decibels, percent
from fxquant.metrics import Batch

__all__ = ["FinishedRows", "SweepRow", "digest"]


@dataclass(frozen=True)
class SweepRow:
    """What one setting reached.

    Attributes:
        name: of the setting, or "float".
        changes: what it changes in the recipe.
        images: how many calibration images it used.
        evaluation: on the evaluation images, with the float model as the reference.
        size_bytes: of the weights as they are stored.
        latency_ms: median of a single image in milliseconds.
        error: why the setting has no figures, or "".
    """

    name: str
    changes: Mapping[str, Any]
    images: int
    evaluation: Evaluation | None
    size_bytes: int | None
    latency_ms: float | None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields, ready for ``json.dumps``."""
        evaluation = None if self.evaluation is None else self.evaluation.to_json()
        return asdict(self) | {"changes": dict(self.changes), "evaluation": evaluation}

    def cells(self, keys: Iterable[str] = ()) -> tuple[str, ...]:
        """The row as text: name, changes by `keys`, then the figures as `Sweep` prints them."""
        if self.evaluation is None:
            return (self.name, self.error)
        reference = self.evaluation.reference or self.evaluation
        return (
            self.name,
            *(self._change(key) for key in keys),
            "-" if self.evaluation.loss is None else f"{self.evaluation.loss:.4f}",
            percent(reference.top1),
            percent(self.evaluation.top1),
            percent(self.evaluation.agreement),
            decibels(self.evaluation.sqnr_db),
            "-" if self.size_bytes is None else f"{self.size_bytes / 1e6:.3f} MB",
            "-" if self.latency_ms is None else f"{self.latency_ms:.3f} ms",
        )

    def _change(self, key: str) -> str:
        value = str(self.changes.get(key, "float"))
        bits = self.changes.get(f"{key}_bits") if value == "i-vit" else None
        return f"{value} {bits}" if bits else value


class FinishedRows:
    """Rows that an interrupted sweep has done, a file each, so that several processes may write.

    Args:
        folder: where they lie; None: nothing is kept.
        mark: `digest` of what the rows belong to.
    """

    def __init__(self, folder: Path | None, mark: str) -> None:
        self.folder, self.mark = folder, mark

    def get(self, name: str) -> SweepRow | None:
        """The row of a setting, if it is done.

        Raises:
            ArtifactError: its file is damaged, or belongs to something else.
        """
        if self.folder is None or not (path := self._path(self.folder, name)).exists():
            return None
        try:
            kept = json.loads(path.read_text())
            mark, fields = kept["digest"], kept["row"]
            evaluation = fields["evaluation"] and _evaluation(fields["evaluation"])
            row = SweepRow(**{**fields, "evaluation": evaluation})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} cannot be read as a row of a sweep ({error}): remove it, and it is "
                "measured again"
            ) from error
        if mark != self.mark:
            raise ArtifactError(
                f"{self.folder} has rows of another study, model, recipe, target or other images: "
                "choose another folder, or repeat what was interrupted exactly"
            )
        return row

    def add(self, row: SweepRow) -> None:
        """Keep a row. One that failed is not kept: its cause may be gone next time."""
        if self.folder is None or row.error:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.folder, row.name)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        fields = asdict(row) | {"changes": dict(row.changes)}
        try:
            unfinished.write_text(json.dumps({"digest": self.mark, "row": fields}, indent=1))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def digest(model: nn.Module, batches: Iterable[Iterable[Batch]], *settings: object) -> str:
    """Of a model's weights, of the first batch of each of `batches`, and of settings."""
    found = hashlib.sha256(repr(settings).encode())
    tensors = list(model.state_dict().values())
    for each in batches:
        batch = next(iter(each))
        tensors += [batch] if not isinstance(batch, tuple | list) else batch
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _evaluation(fields: Mapping[str, Any]) -> Evaluation:
    reference = fields["reference"]
    plain = {
        **fields,
        "reference": reference and _evaluation(reference),
        "changed": tuple(fields["changed"]),
    }
    return Evaluation(**plain)
