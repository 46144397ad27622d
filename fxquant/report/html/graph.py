"""The network as a picture: operations in layers, coloured by their SQNR against float."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from fxquant.report.html.plot import decibels
from fxquant.report.layers import LayerPicture

__all__ = ["LEGEND", "draw", "grade"]

WIDTH, HEIGHT, GAP_X, GAP_Y = 216, 44, 24, 22
GRADES = (10.0, 15.0, 20.0, 25.0, 30.0, 40.0)
"""Between the colours, in dB: from one bit and a half of the signal left to six and a half."""

LEGEND = (
    f"below {GRADES[0]:.0f} dB",
    *(f"{low:.0f} to {high:.0f}" for low, high in itertools.pairwise(GRADES)),
    f"above {GRADES[-1]:.0f}",
)


class Place(NamedTuple):
    """The middle of a box."""

    x: float
    y: float


def grade(decibels: float | None) -> str:
    """The class of a colour; ``none`` where nothing was measured."""
    if decibels is None:
        return "none"
    return f"g{sum(decibels >= bound for bound in GRADES)}"


def draw(pictures: Sequence[LayerPicture]) -> str:
    """An SVG in which every operation is a link to its ``#layer-`` details."""
    places, width, height = layout({each.node: each.inputs for each in pictures})
    edges = "".join(
        _edge(places[source], places[each.node], list(places.values()))
        for each in pictures
        for source in each.inputs
    )
    boxes = "".join(_box(each, places[each.node]) for each in pictures)
    return (
        f'<svg class="network" role="group" aria-label="the network, from its input at the top '
        f'to its output" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{edges}{boxes}</svg>'
    )


def layout(inputs: Mapping[str, Sequence[str]]) -> tuple[dict[str, Place], float, float]:
    """Boxes in rows by their longest way from an input, ordered within by what they read.

    Places of the boxes, width and height; operations must follow what they read.
    """
    rank: dict[str, int] = {}
    for name, sources in inputs.items():
        rank[name] = 1 + max((rank[source] for source in sources), default=-1)
    rows: list[list[str]] = [[] for _ in range(max(rank.values(), default=0) + 1)]
    for name, row in rank.items():
        rows[row].append(name)
    places: dict[str, Place] = {}
    column = WIDTH + GAP_X
    for row, names in enumerate(rows):
        wanted = {
            name: sum(places[s].x for s in inputs[name]) / len(inputs[name]) if inputs[name] else 0
            for name in names
        }
        names.sort(key=lambda name: wanted[name])
        middle = sum(wanted.values()) / max(1, len(names))
        start = middle - column * (len(names) - 1) / 2
        for index, name in enumerate(names):
            places[name] = Place(start + index * column, row * (HEIGHT + GAP_Y) + HEIGHT / 2 + 6)
    left = min((place.x for place in places.values()), default=0) - WIDTH / 2 - 40
    right = max((place.x for place in places.values()), default=0) + WIDTH / 2 + 60
    moved = {name: Place(place.x - left, place.y) for name, place in places.items()}
    return moved, right - left, len(rows) * (HEIGHT + GAP_Y) + 12


def _edge(start: Place, end: Place, boxes: Sequence[Place]) -> str:
    top, bottom = start.y + HEIGHT / 2, end.y - HEIGHT / 2
    if end.y - start.y <= HEIGHT + GAP_Y + 1:
        middle = (top + bottom) / 2
        way = f"C{start.x:.0f} {middle:.0f} {end.x:.0f} {middle:.0f} {end.x:.0f} {bottom:.0f}"
        return f'<path class="edge" d="M{start.x:.0f} {top:.0f}{way}"/>'
    # On the right of everything in between.
    between = max(box.x for box in boxes if start.y <= box.y <= end.y)
    side = between + WIDTH / 2 + min(48.0, 10 + (end.y - start.y) / 40)
    low, high = start.y + 8, end.y - 8
    way = f"H{side - 8:.0f}q8 0 8 8V{high - 8:.0f}q0 8 -8 8H{end.x + WIDTH / 2:.0f}"
    return f'<path class="edge far" d="M{start.x + WIDTH / 2:.0f} {low:.0f}{way}"/>'


def _box(picture: LayerPicture, place: Place) -> str:
    sqnr = "" if picture.accumulated_db is None else decibels(picture.accumulated_db)
    title = " · ".join(
        part
        for part in (
            picture.path or picture.node,
            picture.operation,
            f"runs in {picture.runs_in}" if picture.runs_in else "",
            picture.kernel,
            sqnr,
            picture.reason,
        )
        if part
    )
    name = escape(_elided(picture.path or picture.node, 29))
    below = " · ".join(part for part in (picture.operation, picture.runs_in) if part)
    kind = f"{grade(picture.accumulated_db)} {'float' if picture.runs_in == 'float' else ''}"
    left, top = place.x - WIDTH / 2, place.y - HEIGHT / 2
    right, first, second = left + WIDTH - 8, top + 18, top + 35
    return (
        f'<a href="#layer-{escape(picture.node)}" class="box {kind}">'
        f"<title>{escape(title)}</title>"
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{left + 9:.0f}" y="{first:.0f}">{name}</text>'
        f'<text class="small" x="{left + 9:.0f}" y="{second:.0f}">'
        f"{escape(_elided(below, 26))}</text>"
        f'<text class="small db" x="{right:.0f}" y="{second:.0f}">{escape(sqnr)}</text></a>'
    )


def _elided(text: str, most: int) -> str:
    """The end of a path says more than its beginning."""
    return text if len(text) <= most else f"…{text[1 - most :].lstrip('.')}"
