"""The rules that make blocks, and which of them each granularity applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from passes.blocks.flow import Flow
from passes.blocks.merging import merge_all, merge_modules, merge_resolutions
from passes.blocks.parts import Part

__all__ = ["GRANULARITIES", "RULES", "Granularity", "Rule"]

Granularity = Literal["layer", "block", "stage", "model"]


@dataclass(frozen=True)
class Rule:
    """A reason for which nodes are one block.

    Attributes:
        name: as a block records it.
        block: what such a block is.
        merge: makes parts of this rule out of others; None for the rules by which parts are
            found at first.
    """

    name: str
    block: str
    merge: Callable[[Flow, list[Part]], list[Part]] | None = None


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("named", "what a selector picks by module paths"),
        Rule("residual", "what lies around a residual addition"),
        Rule("branches", "branches that are concatenated or multiplied"),
        Rule("layer", "one layer"),
        Rule("module", "a few parts in a row that make up one module", merge_modules),
        Rule("resolution", "blocks in a row with one output resolution", merge_resolutions),
        Rule("network", "everything up to the last single output", merge_all),
    )
}

GRANULARITIES: dict[Granularity, tuple[str, ...]] = {
    "layer": ("named", "layer"),
    "block": ("named", "residual", "branches", "layer", "module"),
    "stage": ("named", "residual", "branches", "layer", "module", "resolution"),
    "model": ("named", "residual", "branches", "layer", "module", "resolution", "network"),
}
"""The rules of each granularity, in the order in which they apply."""
