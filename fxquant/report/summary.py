"""From what a compile made to the rows of its report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import fx

from fxquant.backends import TargetCheck
from fxquant.report.report import QuantizerRow, Refusal
from fxquant.simulate.quantizers import ActivationQuantizer
from passes import AssignOneSided, PassRecord

__all__ = ["check_summary", "proofs", "quantizer_rows", "refusals"]


def proofs(records: Iterable[PassRecord]) -> dict[str, str]:
    """Why quantizers are one-sided, by path."""
    notes = (note for r in records if r.name == AssignOneSided.name for note in r.notes)
    return dict(note.split(": ", 1) for note in notes)


def quantizer_rows(
    simulated: fx.GraphModule, proofs: Mapping[str, str]
) -> tuple[QuantizerRow, ...]:
    """Every value quantizer with its grid, and the proof of the one-sided ones."""
    return tuple(
        QuantizerRow(name, module.detail, proofs.get(name, ""))
        for name, module in simulated.named_modules()
        if isinstance(module, ActivationQuantizer)
    )


def refusals(leaf_reasons: Mapping[str, str], records: Iterable[PassRecord]) -> tuple[Refusal, ...]:
    """What the front end and the passes declined."""
    leaves = [Refusal("trace", path, path, why) for path, why in leaf_reasons.items()]
    declined = [
        Refusal(record.name, decline.node, decline.path, decline.reason)
        for record in records
        for decline in record.declines
    ]
    return (*leaves, *declined)


def check_summary(check: TargetCheck | None) -> dict[str, Any]:
    """A target's check as plain data; empty for the reference, which is its own measure."""
    if check is None:
        return {}
    return {
        "largest_difference": check.largest,
        "share_differing": check.share_differing,
        "values": sum(entry.values for entry in check.operations),
        "output_differing": check.output_differing,
        # JSON has no infinity: None says that the outputs are equal to the bit.
        "output_sqnr_db": check.output_sqnr_db if math.isfinite(check.output_sqnr_db) else None,
        "operations": [asdict(entry) for entry in check.operations if entry.differing],
    }
