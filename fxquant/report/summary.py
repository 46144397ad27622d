"""From what a compile made to the rows of its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from fxquant.report.report import QuantizerRow, Refusal
from fxquant.simulate.quantizers import ActivationQuantizer
from passes import AssignOneSided, PassRecord

__all__ = ["proofs", "quantizer_rows", "refusals"]


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
