"""What was compared with the reference before an ONNX file was kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxquant.backends.check import OperationDifference

__all__ = ["OnnxCheck", "OnnxReport"]

_WORST = 5


@dataclass(frozen=True)
class OnnxCheck:
    """One run beside the reference.

    `runtime` and `run` say of what; `operations` has an entry for each integer value that was
    compared, `allowed` is the largest difference that keeps the file, in steps, None for any.
    `output_differing` is the share of output values that differ, `output_sqnr_db` their SQNR,
    None where the outputs were not compared.
    """

    runtime: str
    run: str
    operations: tuple[OperationDifference, ...] = ()
    allowed: int | None = None
    output_differing: float | None = None
    output_sqnr_db: float | None = None

    @property
    def largest(self) -> int:
        """The largest difference of any integer, in steps."""
        return max((entry.largest for entry in self.operations), default=0)

    @property
    def values(self) -> int:
        """How many integers were compared."""
        return sum(entry.values for entry in self.operations)

    @property
    def differing(self) -> int:
        """How many of them differ."""
        return sum(entry.differing for entry in self.operations)

    @property
    def failed(self) -> tuple[OperationDifference, ...]:
        """The operations that differ by more than is allowed, the worst first."""
        if self.allowed is None:
            return ()
        found = [entry for entry in self.operations if entry.largest > self.allowed]
        return tuple(sorted(found, key=lambda entry: (-entry.largest, -entry.differing)))

    def to_json(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "runtime": self.runtime,
            "run": self.run,
            "integers": self.values,
            "differing": self.differing,
            "largest": self.largest,
            "allowed": self.allowed,
            "output_differing": self.output_differing,
            "output_sqnr_db": self.output_sqnr_db,
        }


@dataclass(frozen=True)
class OnnxReport:
    """A written file and what was checked; `print` shows the table."""

    path: Path
    bytes: int
    form: str
    exact: bool
    operators: dict[str, int]
    checks: tuple[OnnxCheck, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.operators.items())
        head = f"{self.path}, {self.bytes / 1e6:.2f} MB, {self.form}"
        head += ", exact" if self.exact else ""
        return "\n".join([head, kinds, "", checks_table(self.checks), *self.notes])

    def to_json(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "file": str(self.path),
            "bytes": self.bytes,
            "form": self.form,
            "exact": self.exact,
            "operators": self.operators,
            "checks": [check.to_json() for check in self.checks],
            "notes": list(self.notes),
        }


def checks_table(checks: tuple[OnnxCheck, ...]) -> str:
    """One line a run."""
    rows = [
        (
            check.runtime,
            check.run,
            f"{check.values:,}" if check.operations else "",
            f"{check.differing:,}" if check.operations else "",
            check.largest if check.operations else "",
            "" if check.allowed is None else check.allowed,
            "" if check.output_differing is None else f"{check.output_differing:.2%}",
        )
        for check in checks
    ]
    headers = (
        "runtime",
        "run",
        "integers",
        "that differ",
        "largest, steps",
        "allowed",
        "outputs that differ",
    )
    align = ("left", "left", *["right"] * 5)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def failures(checks: tuple[OnnxCheck, ...]) -> str:
    """What failed, "" where nothing did."""
    return "\n".join(
        f"{check.runtime}, {check.run}: {entry.node} ({entry.operation}) differs by up to "
        f"{entry.largest} in {entry.differing} of {entry.values} values"
        for check in checks
        for entry in check.failed[:_WORST]
    )
