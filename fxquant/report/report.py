"""What a compile did: passes, coverage, quantizers, refusals, sizes, and the target's check.

More than 300 lines, because a report's fields, text and JSON are held against each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxquant.plan.coverage import CoverageRow
from fxquant.report.accuracy import AccuracyTrail
from fxquant.report.html import Section, report_sections, write_page
from fxquant.report.layers import LayerSource
from fxquant.report.provenance import Provenance
from fxquant.report.sizes import written
from passes import PassRecord

_FLOAT_OPERAND = re.compile(r"its operand (\S+) is float")

__all__ = ["QuantizerRow", "Refusal", "Report"]


@dataclass(frozen=True)
class QuantizerRow:
    """One value quantizer: its grid in words, and the proof where it is one-sided."""

    path: str
    grid: str
    proof: str = ""


@dataclass(frozen=True)
class Refusal:
    """A place where a pass or the front end declined, and why."""

    by: str
    node: str
    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All that a user may ask about a compiled model; ``print`` it, or take `to_json`."""

    model: str
    recipe: str
    target: str
    coverage: tuple[CoverageRow, ...]
    quantizers: tuple[QuantizerRow, ...] = ()
    declines: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    target_declines: tuple[Refusal, ...] = ()
    target_notes: tuple[str, ...] = ()
    float_size_bytes: int = 0
    size_bytes: int = 0
    target_check: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[PassRecord, ...] = ()
    target_passes: tuple[PassRecord, ...] = ()
    time_over_float: float | None = None
    timed_on: str = ""
    accuracy: AccuracyTrail | None = None
    layers: LayerSource | None = field(default=None, repr=False, compare=False)
    provenance: Provenance = field(default_factory=Provenance)
    front_end: str = "torch.fx"

    @property
    def macs(self) -> int:
        """The multiply-accumulates of one image, as far as they can be counted."""
        return sum(row.macs or 0 for row in self.coverage)

    @property
    def int8_share(self) -> float:
        """The share of the multiply-accumulates that run on 8-bit integers, 0 to 1."""
        total = self.macs
        integers = ("int8", "dynamic int8")
        return sum(row.macs or 0 for row in self.coverage if row.runs_in in integers) / max(
            1, total
        )

    @property
    def sizes(self) -> str:
        """The weights in float, and the file."""
        ratio = self.float_size_bytes / max(1, self.size_bytes)
        smaller = f" ({ratio:.1f} x smaller)" if ratio >= 1 else ", most of it graph and report"
        return f"{written(self.float_size_bytes)} -> {written(self.size_bytes)}{smaller}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; the records of the passes without times, so that it is reproducible."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "target": self.target,
            "front_end": self.front_end,
            "int8_share": self.int8_share,
            "macs": self.macs,
            "coverage": [asdict(row) for row in self.coverage],
            "quantizers": [asdict(row) for row in self.quantizers],
            "declines": [asdict(row) for row in self.declines],
            "target_declines": [asdict(row) for row in self.target_declines],
            "notes": list(self.notes),
            "target_notes": list(self.target_notes),
            "float_size_bytes": self.float_size_bytes,
            "size_bytes": self.size_bytes,
            "target_check": dict(self.target_check),
            "time_over_float": self.time_over_float,
            "timed_on": self.timed_on,
            "provenance": self.provenance.to_json(),
            "accuracy": self.accuracy and self.accuracy.to_json(),
            "passes": [
                {
                    "name": record.name,
                    "modified": record.modified,
                    "created": record.created,
                    "erased": record.erased,
                    "changes": list(record.changes),
                    "verified": record.verified,
                    "declines": len(record.declines),
                }
                for record in (*self.passes, *self.target_passes)
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report of a loaded artefact; pass records do not come back."""
        return cls(
            model=data["model"],
            recipe=data["recipe"],
            target=data["target"],
            front_end=data.get("front_end", "torch.fx"),
            coverage=tuple(CoverageRow(**row) for row in data["coverage"]),
            quantizers=tuple(QuantizerRow(**row) for row in data["quantizers"]),
            declines=tuple(Refusal(**row) for row in data["declines"]),
            target_declines=tuple(Refusal(**row) for row in data.get("target_declines", ())),
            notes=tuple(data["notes"]),
            target_notes=tuple(data["target_notes"]),
            float_size_bytes=data["float_size_bytes"],
            size_bytes=data["size_bytes"],
            target_check=data["target_check"],
            time_over_float=data.get("time_over_float"),
            timed_on=data.get("timed_on", ""),
            provenance=Provenance.from_json(data["provenance"])
            if "provenance" in data
            else Provenance(),
            accuracy=AccuracyTrail.from_json(data["accuracy"]) if data.get("accuracy") else None,
        )

    def to_html(self, path: str | Path, *, measured: Sequence[Section] = ()) -> None:
        """Write a page to look at: one file that reads nothing else.

        It shows the network with the error of each operation, histograms of weights and values
        with their grids, coverage, and what every pass did. The pictures are measured now, on the
        first images of the calibration. `measured` are more sections, such as those of
        `fxquant.measure.pages`. Raises DataError where the file cannot be written.
        """
        pictures = () if self.layers is None else self.layers.measure(self.coverage)
        sections = report_sections(self, pictures, measured)
        about = f"recipe {self.recipe}, target {self.target}"
        write_page(path, self.model, about, sections)

    def __str__(self) -> str:
        target = "" if self.accuracy is None else str(self.accuracy)
        sections = [
            self._head(),
            target,
            self._passes(),
            self._coverage(),
            self._float(),
            self._grids(),
        ]
        sections += [self._declines(), self._check(), "\n".join((*self.notes, *self.target_notes))]
        return "\n\n".join(section for section in sections if section)

    # -- sections ------------------------------------------------------------------------

    def _head(self) -> str:
        uncounted = Counter(row.operation for row in self.coverage if row.macs is None)
        named = ", ".join(f"{count} x {name}" for name, count in uncounted.items())
        return self._speed() + (
            f"{self.model}, recipe {self.recipe}, target {self.target}\n"
            f"int8: {self._share()}{f' (and of unknown size: {named})' if named else ''}"
            f"   size: {self.sizes}"
        )

    def _speed(self) -> str:
        """First of all where it is bad news: slower than what the user had."""
        if self.time_over_float is None:
            return ""
        if self.time_over_float <= 1:
            return f"{1 / self.time_over_float:.1f} x faster than float ({self.timed_on})\n"
        return (
            f"SLOWER THAN FLOAT here: {self.time_over_float:.1f} x its time ({self.timed_on}); the "
            "notes at the end name the operations without a fast kernel\n"
        )

    def _share(self) -> str:
        if not self.macs:
            integers = sum(row.runs_in != "float" for row in self.coverage)
            return f"{integers} of {len(self.coverage)} operations, none of which multiplies"
        macs = f"{self.macs / 1e6:.1f} million" if self.macs >= 1e5 else f"{self.macs}"
        return f"{self.int8_share:.2%} of {macs} multiply-accumulates"

    def _passes(self) -> str:
        records = (*self.passes, *self.target_passes)
        rows = [
            (
                record.name,
                f"{record.milliseconds:.0f}",
                f"+{record.created} -{record.erased}" if record.created or record.erased else "",
                len(record.changes) or "",
                record.verified,
                len(record.declines) or "",
            )
            for record in records
            if record.modified or record.declines
        ]
        shown = {row[0] for row in rows}
        rest = dict.fromkeys(record.name for record in records if record.name not in shown)
        table = tabulate(rows, ("pass", "ms", "nodes", "layers", "verified", "declined"))
        unchanged = f"without a change: {', '.join(rest)}" if rest else ""
        return "\n".join(part for part in (table if rows else "", unchanged) if part)

    def _coverage(self) -> str:
        total = max(1, self.macs)
        groups: dict[tuple[str, str], list[CoverageRow]] = {}
        for row in self.coverage:
            groups.setdefault((row.operation, row.runs_in), []).append(row)
        rows = [
            (name, runs_in, len(members), _share([row.macs for row in members], total))
            for (name, runs_in), members in groups.items()
        ]
        return tabulate(rows, ("operation", "runs in", "count", "share of MACs"))

    def _float(self) -> str:
        reasons = Counter(
            (row.operation, self._root_cause(row), row.macs != 0)
            for row in self.coverage
            if row.reason
        )
        if not reasons:
            return "every operation runs on integers"
        macs: dict[tuple[str, str, bool], list[int | None]] = {}
        for row in self.coverage:
            key = (row.operation, self._root_cause(row), row.macs != 0)
            macs.setdefault(key, []).append(row.macs)
        rows = [
            (name, count, _share(macs[name, reason, heavy], self.macs), reason)
            for (name, reason, heavy), count in reasons.items()
        ]
        return "not on integers:\n" + tabulate(
            rows, ("operation", "count", "share of MACs", "reason")
        )

    def _root_cause(self, row: CoverageRow) -> str:
        """The reason, where it is a float operand: the operation behind it that has one itself."""
        rows = {each.node: each for each in self.coverage}
        cause = row
        while match := _FLOAT_OPERAND.fullmatch(cause.reason):
            if match[1] not in rows or not rows[match[1]].reason:
                break
            cause = rows[match[1]]
        return row.reason if cause is row else f"it reads what {cause.operation} computes in float"

    def _grids(self) -> str:
        proven = [row for row in self.quantizers if row.proof]
        if not self.quantizers:
            return ""
        lines = [
            f"quantizers: {len(self.quantizers)}, of which {len(proven)} one-sided because their "
            "values are provably non-negative"
        ]
        proofs = Counter(row.proof for row in proven)
        lines += [f"  {count:3d} x {proof}" for proof, count in proofs.most_common()]
        return "\n".join(lines)

    def _declines(self) -> str:
        groups: dict[tuple[str, str], list[Refusal]] = {}
        for decline in (*self.declines, *self.target_declines):
            groups.setdefault((decline.by, decline.reason), []).append(decline)
        rows = []
        for (by, reason), members in groups.items():
            places = [member.path or member.node for member in members]
            shown = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if places[3:] else "")
            rows.append((by, reason, shown))
        return "declined:\n" + tabulate(rows, ("by", "reason", "where")) if rows else ""

    def _check(self) -> str:
        if not self.target_check:
            return ""
        check = self.target_check
        if not check["values"]:
            return ""
        sqnr = check["output_sqnr_db"]
        outputs = "equal to the bit" if sqnr is None else f"{sqnr:.1f} dB"
        return (
            f"{self.target} against reference, operation by operation on the same integers: at "
            f"most {check['largest_difference']} step apart, {check['share_differing']:.4%} of "
            f"{check['values']} values differ; the whole network's outputs: {outputs}"
        )


def _share(macs: Sequence[int | None], total: int) -> str:
    if None in macs:
        return "unknown"
    return f"{sum(count or 0 for count in macs) / max(1, total):.2%}"
