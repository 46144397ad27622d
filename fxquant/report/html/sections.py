"""What a compile's page shows, section by section."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from fxquant.report.html.graph import LEGEND, draw, grade
from fxquant.report.html.page import Markup, Section, cards, details, table
from fxquant.report.html.plot import Plot, decibels, histogram, short
from fxquant.report.layers import LayerPicture, TensorPicture
from fxquant.report.sizes import written
from passes import PassRecord

if TYPE_CHECKING:
    from fxquant.report.report import Report

__all__ = ["bar", "chip", "report_sections"]

_LONGEST_DIFF = 20_000
_HIGHEST = 80.0
"""In dB: above it an error is that of float32 itself, and the axis would hide the others."""


def report_sections(
    report: Report, pictures: Sequence[LayerPicture], measured: Sequence[Section] = ()
) -> list[Section]:
    """The page of a compile; `measured` are sections of figures that the report does not hold."""
    return [
        Section("Summary", _summary(report, pictures)),
        Section("Accuracy target", _trail(report)),
        Section("Network", _network(pictures)),
        Section("Error along the depth", _depth(pictures)),
        Section("Layers", _layers(pictures)),
        Section("Coverage", _coverage(report)),
        *measured,
        Section("Passes", _passes((*report.passes, *report.target_passes))),
        Section("Declined and noted", _notes(report)),
    ]


def chip(value: float | None) -> Markup:
    """An SQNR on its colour."""
    return Markup(f'<span class="chip {grade(value)}">{decibels(value)}</span>')


def bar(share: float, text: str) -> Markup:
    """A share in [0, 1] as a bar with words behind."""
    width = f"width:{max(0.0, share) * 5:.2f}rem"
    return Markup(f'<span class="share" aria-hidden="true" style="{width}"></span> {escape(text)}')


def _summary(report: Report, pictures: Sequence[LayerPicture]) -> str:
    facts = [("int8 multiply-accumulates", f"{report.int8_share:.2%}" if report.macs else "none")]
    sizes = f"{written(report.float_size_bytes)} → {written(report.size_bytes)}"
    facts.append(("float weights → file", sizes))
    if report.macs:
        facts.append(("of one image", f"{report.macs / 1e6:,.1f} M MAC"))
    if pictures:
        facts.append(("SQNR of the output", decibels(pictures[-1].accumulated_db)))
    if report.time_over_float:
        facts.append(("speed over float", f"{1 / report.time_over_float:.2f} x"))
    check = report.target_check
    if check and check["values"]:
        steps = check["largest_difference"]
        words = f"{steps} step{'' if steps == 1 else 's'}, {check['share_differing']:.3%}"
        facts.append((f"{report.target} off reference: most, how often", words))
    return cards(facts)


def _trail(report: Report) -> str:
    return (
        "" if report.accuracy is None else f'<pre tabindex="0">{escape(str(report.accuracy))}</pre>'
    )


def _network(pictures: Sequence[LayerPicture]) -> str:
    if not pictures:
        return (
            "<p>A loaded file holds no float network: the page of a compile shows every operation "
            "with its error.</p>"
        )
    legend = "".join(
        f'<li><span class="chip g{index}">{escape(words)}</span></li>'
        for index, words in enumerate(LEGEND)
    )
    buttons = "".join(
        f'<button type="button" data-zoom="{action}" aria-label="{name}">{shown}</button>'
        for action, shown, name in (
            ("in", "+", "zoom in"),
            ("out", "−", "zoom out"),
            ("width", "width", "fit to the width"),
            ("all", "all", "show all"),
        )
    )
    return (
        "<p>Every box is an operation of the fused graph; its colour is the SQNR of what it yields "
        "against the float network, with the errors of all before it. A dashed frame runs in "
        "float. A box leads to its layer. Keys within the picture: + and − zoom, 0 shows all, "
        "arrows scroll; ctrl and the wheel zoom.</p>"
        f'<ul class="legend">{legend}<li><span class="key dashed"></span>in float</li></ul>'
        f'<div class="tools" hidden>{buttons}<output aria-live="polite">100 %</output></div>'
        f'<div class="map" tabindex="0" role="region" aria-label="network">{draw(pictures)}</div>'
    )


def _depth(pictures: Sequence[LayerPicture]) -> str:
    reached = [(k, each) for k, each in enumerate(pictures) if _finite(each.accumulated_db)]
    if not reached:
        return ""
    series: dict[str, list[tuple[int, float, LayerPicture]]] = {
        "accumulated, as it runs": [(k, each.accumulated_db or 0.0, each) for k, each in reached],
        "the value's own rounding": [
            (k, each.value.sqnr_db, each)
            for k, each in enumerate(pictures)
            if each.value and _finite(each.value.sqnr_db)
        ],
        "the weight's rounding": [
            (k, each.weight.sqnr_db, each)
            for k, each in enumerate(pictures)
            if each.weight and _finite(each.weight.sqnr_db)
        ],
    }
    figures = [min(y, _HIGHEST) for points in series.values() for _, y, _ in points]
    plot = Plot(
        "SQNR of every operation along the depth",
        (0, len(pictures) - 1),
        (min([0.0, *figures]), max(figures) * 1.05),
        x_name="operation, in the order of execution",
        y_name="SQNR, dB",
        width=max(680, min(1150, 9 * len(pictures))),
    )
    for index, (name, points) in enumerate(series.items()):
        titles = [f"{_name(each)}: {decibels(y)}, {name}" for _, y, each in points]
        places = [(float(k), min(y, _HIGHEST)) for k, y, _ in points]
        if index:
            plot.dots(places, index, name, titles=titles)
        else:
            plot.line(places, index, name, titles=titles)
    worst = sorted(reached, key=lambda pair: pair[1].accumulated_db or 0)[:10]
    losses = _losses(pictures)
    rows = [
        (
            Markup(f'<a href="#layer-{escape(each.node)}">{escape(_name(each))}</a>'),
            each.operation,
            chip(each.accumulated_db),
            "–" if each.node not in losses else f"{losses[each.node]:.1f} dB",
        )
        for _, each in worst
    ]
    return (
        plot.render()
        + f"<p>What lies above {_HIGHEST:.0f} dB is drawn there.</p>"
        + "<h3>Ten operations with the lowest SQNR</h3>"
        + table(("operation", "kind", "SQNR", "lost here"), rows, texts=2)
    )


def _losses(pictures: Sequence[LayerPicture]) -> dict[str, float]:
    """How many dB lower an operation's value is than the worst of what it reads."""
    reached = {each.node: each.accumulated_db for each in pictures}
    lost = {}
    for each in pictures:
        before = [reached[source] for source in each.inputs if _finite(reached[source])]
        if before and _finite(each.accumulated_db):
            lost[each.node] = min(value or 0.0 for value in before) - (each.accumulated_db or 0.0)
    return lost


def _layers(pictures: Sequence[LayerPicture]) -> str:
    return "".join(_layer(each) for each in pictures)


def _layer(each: LayerPicture) -> str:
    runs = " · ".join(part for part in (each.operation, each.runs_in, each.kernel) if part)
    summary = (
        f'{chip(each.accumulated_db)}{escape(_name(each))} <span class="soft">{escape(runs)}</span>'
    )
    facts = [("node", each.node)]
    if each.shape:
        facts.append(("shape", " × ".join(map(str, each.shape))))
    if each.macs:
        facts.append(("multiply-accumulates of an image", f"{each.macs:,}"))
    if each.bias_db is not None:
        facts.append(("SQNR of the bias", decibels(each.bias_db)))
    if each.reason:
        facts.append(("not on integers, because", each.reason))
    facts_table = table(("", ""), facts, texts=2) if facts else ""
    charts = "".join(
        f"<div><h3>{name}</h3>{histogram(shown.histogram, name.lower(), shown.codes)}"
        f"{_grid(shown)}</div>"
        for name, shown in (("Weight", each.weight), ("Values", each.value))
        if shown is not None
    )
    body = f'{facts_table}<div class="pair">{charts}</div>'
    return details(summary, body, anchor=f"layer-{each.node}")


def _grid(shown: TensorPicture) -> str:
    rows = [
        ("codes", shown.codes),
        ("scale", _span(shown.scale)),
        ("zero point", _span(shown.zero_point)),
        ("clipped", f"{shown.clipped:.3%}"),
        ("SQNR by itself", decibels(shown.sqnr_db)),
        ("largest error", short(shown.max_error)),
    ]
    return table(("", ""), rows)


def _coverage(report: Report) -> str:
    total = max(1, report.macs)
    groups: dict[tuple[str, str], list[int | None]] = {}
    for row in report.coverage:
        groups.setdefault((row.operation, row.runs_in), []).append(row.macs)
    rows = [
        (name, runs, len(macs), bar(_share(macs, total), f"{_share(macs, total):.2%}"))
        for (name, runs), macs in groups.items()
    ]
    shown = table(("operation", "runs in", "count", "share of MACs"), rows, texts=2, sort=True)
    reasons = Counter((row.operation, row.reason) for row in report.coverage if row.reason)
    if not reasons:
        return f"{shown}<p>Every operation runs on integers.</p>"
    why = [(name, reason, count) for (name, reason), count in reasons.most_common()]
    return f"{shown}<h3>Not on integers</h3>" + table(
        ("operation", "reason", "count"), why, texts=2, sort=True
    )


def _share(macs: Sequence[int | None], total: int) -> float:
    return sum(count or 0 for count in macs) / total


def _passes(records: Sequence[PassRecord]) -> str:
    folded = []
    for record in records:
        nodes = f"+{record.created} −{record.erased} nodes" if record.modified else "no change"
        parts = [f"{record.milliseconds:.0f} ms", nodes]
        if record.verified:
            parts.append(f"verified: {record.verified}")
        if record.declines:
            parts.append(f"declined {len(record.declines)}")
        head = f'{escape(record.name)} <span class="soft">{escape(" · ".join(parts))}</span>'
        folded.append(details(head, _diff(record.diff)))
    return "".join(folded)


def _diff(text: str) -> str:
    if not text:
        return "<p>It changed nothing.</p>"
    kinds = {"+": "plus", "-": "minus"}
    left = len(text) - _LONGEST_DIFF
    lines = [
        f'<span class="{kinds[line[0]]}">{escape(line)}</span>'
        if line[:1] in kinds
        else escape(line)
        for line in text[:_LONGEST_DIFF].splitlines()
    ]
    more = f"\n… {left:,} more characters: fxquant compile --diff" if left > 0 else ""
    return f'<pre tabindex="0">{chr(10).join(lines)}{more}</pre>'


def _notes(report: Report) -> str:
    declined = [(each.by, each.path or each.node, each.reason) for each in report.declines]
    shown = table(("by", "where", "reason"), declined, texts=3, sort=True) if declined else ""
    proofs: Mapping[str, int] = Counter(row.proof for row in report.quantizers if row.proof)
    notes = [f"{count} quantizers are one-sided: {proof}" for proof, count in proofs.items()]
    notes += [*report.notes, *report.target_notes]
    return shown + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _name(each: LayerPicture) -> str:
    return each.path or each.node


def _span(ends: tuple[float, float]) -> str:
    low, high = ends
    return short(low) if low == high else f"{short(low)} to {short(high)}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
