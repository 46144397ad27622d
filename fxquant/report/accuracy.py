"""How an accuracy target was reached: what each step raised, what it cost and what it brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fxquant.report.sizes import written

__all__ = ["AccuracyStep", "AccuracyTrail"]


@dataclass(frozen=True)
class AccuracyStep:
    """One model on the way: what was raised, as ``weights of fc: 4 -> 8 bits``, and its figures.

    `metric` is None where it could not be compiled, and `refused` says why. `bound` is the drop
    with what chance may carry it at the trail's confidence: the target holds where it is below.
    """

    raised: tuple[str, ...]
    metric: float | None
    size_bytes: int = 0
    int8_share: float = 0.0
    refused: str = ""
    bound: float | None = None


@dataclass(frozen=True)
class AccuracyTrail:
    """All steps; `most` is how much of `metric` may be lost against `float_value`.

    `confidence` is that of the steps' bounds, one-sided; 0.5 where the drop is taken as measured.
    """

    metric: str
    larger_is_better: bool
    float_value: float
    most: float
    images: int
    steps: tuple[AccuracyStep, ...]
    kept: int
    confidence: float = 0.5

    @property
    def drop(self) -> float:
        """Of the model that was kept; negative where it is better than float."""
        return self.drop_of(self.steps[self.kept])

    @property
    def bound(self) -> float:
        """Of the model that was kept: what its drop is held to be at most."""
        bound = self.steps[self.kept].bound
        return self.drop if bound is None else bound

    @property
    def words(self) -> str:
        """By how much the metric of the model that was kept drops, as messages say it."""
        if self.bound == self.drop:
            return f"drops by {self.drop:.4g}"
        return (
            f"drops by {self.drop:.4g}, with a confidence of {self.confidence:.0%} by at most "
            f"{self.bound:.4g}"
        )

    def drop_of(self, step: AccuracyStep) -> float:
        """By how much the metric of a step is worse than float's."""
        assert step.metric is not None
        found = step.metric - self.float_value
        # Zero has no sign here.
        return 0.0 - found if self.larger_is_better else found

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"drop": self.drop}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AccuracyTrail:
        """What `to_json` gave."""
        steps = tuple(
            AccuracyStep(**{**step, "raised": tuple(step["raised"])}) for step in data["steps"]
        )
        fields = {key: value for key, value in data.items() if key != "drop"}
        return cls(**{**fields, "steps": steps})

    def __str__(self) -> str:
        verdict = "reached" if self.bound <= self.most else "NOT REACHED"
        head = (
            f"accuracy target {verdict}: {self.metric} {self.words}; at most {self.most:.4g} was "
            f"asked for; float has {self.float_value:.5g} on {self.images} images"
        )
        rows = []
        for number, step in enumerate(self.steps):
            what = _grouped(step.raised) or "as the recipe says"
            name = f"{number}{' *' if number == self.kept else ''}"
            if step.metric is None:
                rows.append((name, what, "-", "-", "-", "-", step.refused))
                continue
            drop = self.drop_of(step)
            bound = drop if step.bound is None else step.bound
            figures = (f"{step.metric:.5g}", f"{drop:.4g}", f"{bound:.4g}")
            rows.append((name, what, *figures, written(step.size_bytes), f"{step.int8_share:.2%}"))
        headers = ("step", "raised", self.metric, "drop", "at most", "size", "int8")
        return f"{head}\n{tabulate(rows, headers, disable_numparse=True)}"


def _grouped(raised: Sequence[str]) -> str:
    """Equal changes together: ``4 -> 8 bits: weights of a, b``."""
    groups: dict[str, list[str]] = {}
    for text in raised:
        where, _, change = text.rpartition(": ")
        groups.setdefault(change, []).append(where)
    lines = []
    for change, places in groups.items():
        lines += [f"{change}:" if any(places) else change]
        lines += [f"  {place}" for place in places if place]
    return "\n".join(lines)
