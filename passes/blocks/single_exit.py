"""Which parts of a graph have one entry and one exit, and which of them make a good block."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from passes.blocks.flow import Flow, is_layer
from passes.infra.stored import module_of
from passes.infra.walk import reached
from passes.layers.fused_layer import FusedLayer, add_relu

__all__ = ["SingleExit", "find_regions"]

_MOST_LAYERS = 12  # a region with more is left in its parts, where it has any
_RESIDUALS_INSIDE = {"residual": 1, "branches": 0}
"""How many regions around residual additions a region of either rule may take in."""


@dataclass(frozen=True)
class SingleExit:
    """The nodes behind an entry that all lead to `exit`, and nowhere else; `exit` included.

    `rule` says how its branches meet: "residual" in an addition, "branches" in anything else.
    """

    members: frozenset[fx.Node]
    exit: fx.Node
    rule: str


def find_regions(
    flow: Flow, allowed: Collection[fx.Node], rules: Collection[str]
) -> list[SingleExit]:
    """The regions of `allowed` nodes that one of the `rules` makes a block, none inside another.

    A region ends where branches meet and begins behind the last node that all paths to there
    have passed. Where regions lie inside each other, that around a residual addition takes in
    what lies inside of it (squeeze-and-excitation, the products of attention), unless that is
    two residual additions in a row: then it is a skip around blocks, and these are the blocks.
    Other joins (concatenation, gating) make a block where no residual addition is inside.
    """
    owner: dict[fx.Node, SingleExit] = {}
    regions = [region for region in _regions(flow, allowed) if region.rule in rules]
    for region in sorted(regions, key=lambda region: len(region.members)):
        layers = sum(map(is_layer, region.members))
        inside = {id(r): r for r in (owner.get(node) for node in region.members) if r}.values()
        residuals = sum(r.rule == "residual" for r in inside)
        fits = layers <= _MOST_LAYERS or not inside
        if layers and fits and residuals <= _RESIDUALS_INSIDE[region.rule]:
            owner.update(dict.fromkeys(region.members, region))
    return list({id(region): region for region in owner.values()}.values())


def _regions(flow: Flow, allowed: Collection[fx.Node]) -> Iterable[SingleExit]:
    dominator = _immediate_dominators(flow)
    for join, sources in flow.reads.items():
        if len(sources) < 2 or join.op == "output" or join not in allowed:
            continue
        entry = dominator[join]
        if entry is None:
            continue
        members = _between(flow, entry, join)
        closed = all(set(flow.readers[node]) <= members for node in members if node is not join)
        if closed and all(node in allowed for node in members):
            yield SingleExit(frozenset(members), join, _rule(join))


def _between(flow: Flow, entry: fx.Node, join: fx.Node) -> set[fx.Node]:
    """What `join` is computed from behind `entry`, itself included."""
    return set(reached([join], lambda node: [s for s in flow.reads[node] if s is not entry]))


def _immediate_dominators(flow: Flow) -> dict[fx.Node, fx.Node | None]:
    """The last node that every path from the inputs to a node passes; None: there is none."""
    dominator: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node | None, int] = {None: 0}
    for node, sources in flow.reads.items():
        common: fx.Node | None = sources[0] if sources else None
        for source in sources[1:]:
            other: fx.Node | None = source
            while common is not other:
                if depth[common] >= depth[other]:
                    assert common is not None
                    common = dominator[common]
                else:
                    assert other is not None
                    other = dominator[other]
        dominator[node] = common
        depth[node] = depth[common] + 1
    return dominator


def _rule(join: fx.Node) -> str:
    adds = join.target in (torch.add, add_relu) or isinstance(module_of(join), FusedLayer)
    return "residual" if adds else "branches"
