"""Charts as plain SVG: axes with names and ticks, lines, dots and histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fxquant.report.layers import Histogram

__all__ = ["Plot", "decibels", "histogram", "short"]

Point = tuple[float, float]
_NARROW, _LEAST = 400, 270
"""What is narrower than a phone's page shrinks with it, to this width; other charts scroll."""


class Plot:
    """A chart of two axes, drawn in the page's units; what is drawn first lies below.

    Args:
        label: what it shows, for those who cannot see it.
        x, y: the values at the ends of the axes.
        x_name, y_name: of the axes, with their units.
        log_x, log_y: ticks at powers of ten; the values are logarithms already.
    """

    def __init__(
        self,
        label: str,
        x: Point,
        y: Point,
        *,
        x_name: str,
        y_name: str,
        width: int = 720,
        height: int = 280,
        log_x: bool = False,
        log_y: bool = False,
        x_ticks: Sequence[tuple[float, str]] | None = None,
    ) -> None:
        self.label, self.width, self.height = label, width, height
        self.left, self.right, self.top, self.bottom = 54, 12, 12, 42
        self.x_range, self.y_range = _widened(x), _widened(y)
        self.parts: list[str] = []
        self.legend: list[tuple[str, str]] = []
        base = height - self.bottom
        for value, text in x_ticks if x_ticks is not None else _ticks(self.x_range, log_x):
            at = self.x(value)
            self._add(f'<path class="grid" d="M{at:.1f} {self.top}V{base}"/>')
            self._add(f'<text class="tick" x="{at:.1f}" y="{base + 14}">{escape(text)}</text>')
        for value, text in _ticks(self.y_range, log_y):
            at = self.y(value)
            self._add(f'<path class="grid" d="M{self.left} {at:.1f}H{width - self.right}"/>')
            self._add(
                f'<text class="tick y" x="{self.left - 5}" y="{at + 4:.1f}">{escape(text)}</text>'
            )
        middle = (self.left + width - self.right) / 2
        self._add(f'<text class="name" x="{middle:.0f}" y="{height - 6}">{escape(x_name)}</text>')
        turned = f"translate(12 {(self.top + base) / 2:.0f}) rotate(-90)"
        self._add(f'<text class="name" transform="{turned}">{escape(y_name)}</text>')

    def x(self, value: float) -> float:
        """Where a value lies, from the left."""
        low, high = self.x_range
        span = self.width - self.left - self.right
        return self.left + span * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Where a value lies, from the top."""
        low, high = self.y_range
        span = self.height - self.top - self.bottom
        return self.top + span * (high - value) / (high - low)

    def line(
        self,
        points: Sequence[Point],
        series: int,
        name: str = "",
        *,
        dots: bool = True,
        titles: Sequence[str] = (),
    ) -> None:
        """Points in a series' colour, joined; `titles` say what each is."""
        places = [(self.x(x), self.y(y)) for x, y in points]
        if len(places) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            self._add(f'<path class="line s{series}" d="M{path}"/>')
        if dots:
            self.dots(points, series, titles=titles)
        if name:
            self.legend.append((f"s{series}", name))

    def dots(
        self, points: Sequence[Point], series: int, name: str = "", *, titles: Sequence[str] = ()
    ) -> None:
        """Points in a series' colour."""
        for index, (x, y) in enumerate(points):
            title = f"<title>{escape(titles[index])}</title>" if titles else ""
            self._add(
                f'<circle class="dot s{series}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3">'
                f"{title}</circle>"
            )
        if name:
            self.legend.append((f"s{series}", name))

    def text(self, point: Point, words: str) -> None:
        """Words to the right of a point; to its left where there is no room."""
        x, y = self.x(point[0]), self.y(point[1])
        room = self.width - self.right - x
        side = ("start", x + 6) if room > 6.2 * len(words) + 6 else ("end", x - 6)
        self._add(
            f'<text class="note" text-anchor="{side[0]}" x="{side[1]:.1f}" y="{y - 5:.1f}">'
            f"{escape(words)}</text>"
        )

    def bars(self, edges: Sequence[float], heights: Sequence[float], kind: str) -> None:
        """Touching bars between neighbouring edges, as one shape."""
        base = self.y(self.y_range[0])
        path = []
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            if height > self.y_range[0]:
                a, b = self.x(left), self.x(right)
                path.append(f"M{a:.1f} {base:.1f}V{self.y(height):.1f}H{b:.1f}V{base:.1f}")
        if path:
            self._add(f'<path class="bars {kind}" d="{"".join(path)}"/>')

    def verticals(self, values: Sequence[float], kind: str) -> None:
        """Lines from the top to the bottom."""
        top, bottom = self.top, self.height - self.bottom
        path = "".join(f"M{self.x(value):.1f} {top}V{bottom}" for value in values)
        self._add(f'<path class="{kind}" d="{path}"/>')

    def render(self) -> str:
        """The chart and its legend."""
        legend = "".join(
            f'<li><span class="key {kind}"></span>{escape(name)}</li>' for kind, name in self.legend
        )
        least = self.width if self.width > _NARROW else _LEAST
        return (
            '<figure class="plot"><div class="wide" tabindex="0" role="region" '
            f'aria-label="{escape(self.label)}">'
            f'<svg role="img" aria-label="{escape(self.label)}" '
            f'style="min-width:{least}px;max-width:{1.3 * self.width:.0f}px" '
            f'viewBox="0 0 {self.width} {self.height}">'
            f"{''.join(self.parts)}</svg></div>"
            + (f'<ul class="legend">{legend}</ul>' if legend else "")
            + "</figure>"
        )

    def _add(self, part: str) -> None:
        self.parts.append(part)


def histogram(shown: Histogram, name: str, codes: int) -> str:
    """Counts on a logarithmic axis, clipped tails, the grid's ends and, where few, its codes."""
    bins = len(shown.counts)
    step = (shown.high - shown.low) / bins or 1.0
    edges = [shown.low + step * index for index in range(bins + 1)]
    heights = [math.log10(count) + 0.15 if count else 0.0 for count in shown.counts]
    x_name = {"value": "value", "": name}.get(shown.unit, shown.unit)
    plot = Plot(
        f"histogram of the {name}",
        (shown.low, shown.high),
        (0.0, max([1.0, *heights])),
        x_name=f"{name}, {x_name}" if x_name != "value" else name,
        y_name="count",
        width=340,
        height=190,
        log_y=True,
    )
    inside = [
        height if shown.grid_low - step <= (low + step / 2) <= shown.grid_high + step else 0.0
        for height, low in zip(heights, edges, strict=False)
    ]
    plot.bars(edges, inside, "s0")
    outside = [height if not kept else 0.0 for height, kept in zip(heights, inside, strict=True)]
    plot.bars(edges, outside, "clipped")
    if codes <= 16:
        width = (shown.grid_high - shown.grid_low) / (codes - 1)
        plot.verticals([shown.grid_low + width * code for code in range(codes)], "code")
    plot.verticals([shown.grid_low, shown.grid_high], "bound")
    return plot.render()


def decibels(value: float | None) -> str:
    """An SQNR for people."""
    if value is None:
        return "–"
    return "exact" if math.isinf(value) and value > 0 else f"{value:.1f} dB"


def short(value: float) -> str:
    """A figure in at most four digits."""
    return f"{value:.3g}"


def _widened(ends: Point) -> Point:
    low, high = ends
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(ends: Point, log: bool) -> list[tuple[float, str]]:
    low, high = ends
    if log:
        powers = range(math.ceil(low), math.floor(high) + 1)
        every = max(1, math.ceil(len(powers) / 5))
        return [(power, _power(power)) for power in powers if power % every == 0]
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1.0, 2.0, 5.0, 10.0) if size * factor >= 0.999 * raw)
    first = math.ceil(low / step)
    count = math.floor(high / step) - first + 1
    return [((first + k) * step, f"{(first + k) * step:.6g}") for k in range(count)]


def _power(exponent: int) -> str:
    if 0 <= exponent < 4:
        return str(10**exponent)
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"
