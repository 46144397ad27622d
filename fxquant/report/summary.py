"""From what a compile made to the rows of its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import fx

from fxquant.backends import TargetCheck
from fxquant.frontend.trace import Traced
from fxquant.report.report import QuantizerRow, Refusal
from fxquant.simulate.quantizers import ActivationQuantizer
from passes import PassRecord

__all__ = ["check_summary", "quantizer_rows", "refusals"]


def quantizer_rows(
    simulated: fx.GraphModule, records: Sequence[PassRecord]
) -> tuple[QuantizerRow, ...]:
    """Every value quantizer with its grid, and the proof of the one-sided ones."""
    proofs = dict(
        note.split(": ", 1)
        for record in records
        if record.name == "assign_one_sided"
        for note in record.notes
    )
    return tuple(
        QuantizerRow(name, module.detail, proofs.get(name, ""))
        for name, module in simulated.named_modules()
        if isinstance(module, ActivationQuantizer)
    )


def refusals(traced: Traced, records: Sequence[PassRecord]) -> tuple[Refusal, ...]:
    """What the front end and the passes declined."""
    leaves = [Refusal("trace", path, path, why) for path, why in traced.leaf_reasons.items()]
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
