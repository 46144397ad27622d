"""What measurements look like: sections of a compile's page, and pages of their own."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path

from fxquant.compiled import CompiledModel
from fxquant.data import ImageBatches
from fxquant.measure.benchmark import Machine
from fxquant.measure.compare import Comparison
from fxquant.measure.evaluate import Change, Evaluation
from fxquant.measure.node_times import node_times
from fxquant.measure.sensitivity import Sensitivity
from fxquant.measure.sweep import Sweep
from fxquant.measure.sweep_rows import SweepRow
from fxquant.measure.tables import decibels, percent
from fxquant.report.html.page import Markup, Section, table, write_page
from fxquant.report.html.plot import Plot
from fxquant.report.html.sections import bar, chip

__all__ = [
    "accuracy_section",
    "comparison_section",
    "latency_section",
    "times_table",
    "write_sensitivity",
    "write_sweep",
]

_MOST_IMAGES = 24
_SIDE = 160


def accuracy_section(
    evaluation: Evaluation, batches: ImageBatches | None = None, *, most: int = _MOST_IMAGES
) -> Section:
    """Accuracy beside float, and the images whose prediction is another one.

    `batches` are those of the evaluation; without them the images are only named by number.
    """
    rows = [("float", evaluation.reference), ("quantized", evaluation)]
    shown = table(
        ("", "images", "top-1", "top-5", "agreement", "SQNR"),
        [
            (
                name,
                row.images,
                percent(row.top1),
                percent(row.top5),
                percent(row.agreement),
                decibels(row.sqnr_db),
            )
            for name, row in rows
            if row is not None
        ],
    )
    if not evaluation.changed:
        return Section("Accuracy", f"{shown}<p>No prediction changed.</p>")
    lost = sum(change.label == change.reference for change in evaluation.changed)
    won = sum(change.label == change.found for change in evaluation.changed)
    count = len(evaluation.changed)
    words = f"{count} predictions changed"
    if any(change.label is not None for change in evaluation.changed):
        words += f": {lost} were right in float, {won} are right now, {count - lost - won} neither"
    first = f"; the first {most} are shown" if count > most else ""
    figures = "".join(_image(change, batches) for change in evaluation.changed[:most])
    return Section("Accuracy", f'{shown}<p>{words}{first}.</p><div class="images">{figures}</div>')


def latency_section(compiled: CompiledModel) -> Section:
    """How long each operation takes on the example, measured now; see `node_times`."""
    about = (
        f"One sample on target {compiled.target}, {Machine.here()}. Each operation is timed by "
        "itself: their sum is more than a whole call takes, shares are what to trust."
    )
    operations = {row.node for row in compiled.report.coverage}
    times = node_times(compiled, compiled.example)
    return Section("Latency", f"<p>{escape(about)}</p>{times_table(times, operations)}")


def times_table(milliseconds: Mapping[str, float], operations: Collection[str]) -> str:
    """The time of each node as bars, longest first; `operations` have details to lead to."""
    total = sum(milliseconds.values()) or 1.0
    longest = max(milliseconds.values(), default=1.0) or 1.0
    rows = [
        (
            Markup(f'<a href="#layer-{escape(name)}">{escape(name)}</a>')
            if name in operations
            else name,
            f"{spent:.4f}",
            f"{spent / total:.2%}",
            bar(spent / longest, ""),
        )
        for name, spent in sorted(milliseconds.items(), key=lambda pair: -pair[1])
    ]
    return table(("operation", "ms", "share", "of the longest"), rows, sort=True)


def comparison_section(comparison: Comparison) -> Section:
    """Every weight and value against float, in a table that can be sorted."""
    rows = [
        (
            row.what,
            row.name,
            chip(row.sqnr_db),
            f"{row.mse:.3g}",
            f"{row.cosine:.5f}",
            f"{row.max_error:.3g}",
        )
        for row in comparison.rows
    ]
    headers = ("what", "name", "SQNR", "MSE", "cosine", "largest error")
    return Section("Comparison", table(headers, rows, texts=2, sort=True))


def write_sensitivity(found: Sensitivity, path: str | Path, model: str) -> None:
    """A page of `sensitivity`: the output's SQNR and KL divergence, one layer at a time.

    Raises DataError where the file cannot be written.
    """
    sections = []
    for what in ("weight", "activation"):
        effects = found.of("weight" if what == "weight" else "activation")
        if not effects:
            continue
        paths = list(effects)
        rows = [(path, width, effect) for path in paths for width, effect in effects[path].items()]
        charts = [
            _chart(
                paths,
                {
                    width: {path: effect.sqnr_db for path, w, effect in rows if w == width}
                    for width in found.bits
                },
                "SQNR of the output, dB",
            )
        ]
        kl = {
            width: {
                path: math.log10(effect.kl)
                for path, w, effect in rows
                if w == width and effect.kl is not None and effect.kl > 0
            }
            for width in found.bits
        }
        if any(kl.values()):
            charts.append(_chart(paths, kl, "KL from float, nats", log=True))
        lines = [
            (
                path,
                width,
                chip(effect.sqnr_db),
                "-" if effect.kl is None else f"{effect.kl:.3g}",
                "-" if effect.loss is None else f"{effect.loss:.4f}",
            )
            for path, width, effect in rows
        ]
        headers = (what, "bits", "SQNR of the output", "KL, nats", "loss, nats")
        sections.append(
            Section(f"One {what} at a time", "".join(charts) + table(headers, lines, sort=True))
        )
    about = f"sensitivity on {found.images} images, recipe {found.recipe}"
    write_page(path, model, about, sections)


def write_sweep(found: Sweep, path: str | Path, model: str) -> None:
    """A page of `sweep`: accuracy against bits, size and latency, and the table.

    Raises DataError where the file cannot be written.
    """
    rows = [row for row in found.rows if row.evaluation is not None]
    axes = {
        "bits of weights": [_bits(row) for row in rows],
        "size of the weights, MB": [row.size_bytes and row.size_bytes / 1e6 for row in rows],
        "latency of an image, ms": [row.latency_ms for row in rows],
    }
    charts = "".join(
        _scatter(name, [(x, row) for x, row in zip(values, rows, strict=True) if x is not None])
        for name, values in axes.items()
        if len({value for value in values if value is not None}) > 1
    )
    figures = ("loss", "float top-1", "top-1", "agreement", "SQNR", "size", "latency")
    shown = table((found.study, *figures), [row.cells() for row in rows], sort=True)
    failed = "".join(
        f"<p>{escape(row.name)}: {escape(row.error)}</p>" for row in found.rows if row.error
    )
    about = f"study {found.study}, recipe {found.recipe}, target {found.target}; {found.machine}"
    sections = [Section("Accuracy against its price", charts), Section("Rows", shown + failed)]
    write_page(path, model, about, sections)


def _chart(
    paths: Sequence[str], lines: Mapping[int, Mapping[str, float]], name: str, *, log: bool = False
) -> str:
    place = {path: float(index) for index, path in enumerate(paths)}
    finite = [y for line in lines.values() for y in line.values() if math.isfinite(y)]
    if not finite:
        return ""
    step = max(1, len(paths) // 12)
    plot = Plot(
        name,
        (0, len(paths) - 1),
        (min(finite), max(finite)),
        x_name="layer, in the order of the graph",
        y_name=name,
        width=max(680, min(1150, 12 * len(paths))),
        log_y=log,
        x_ticks=[(k, str(k)) for k in range(0, len(paths), step)],
    )
    for series, (width, line) in enumerate(lines.items()):
        points = [(place[path], y) for path, y in line.items() if math.isfinite(y)]
        titles = [f"{path}, {width} bits: {y:.3g}" for path, y in line.items() if math.isfinite(y)]
        plot.line(points, series % 5, f"{width} bits", titles=titles)
    return plot.render()


def _scatter(name: str, points: Sequence[tuple[float, SweepRow]]) -> str:
    found = [row.evaluation for _, row in points]
    labelled = all(each is not None and each.top1 is not None for each in found)
    reached = [_reached(row, labelled) for _, row in points]
    kept = [(x, y, row) for (x, row), y in zip(points, reached, strict=True) if math.isfinite(y)]
    if not kept:
        return ""
    xs, ys = [x for x, _, _ in kept], [y for _, y, _ in kept]
    margin_x, margin_y = 0.06 * (max(xs) - min(xs)), max(0.5, 0.08 * (max(ys) - min(ys)))
    plot = Plot(
        f"accuracy against {name}",
        (min(xs) - margin_x, max(xs) + margin_x),
        (min(ys) - margin_y, max(ys) + margin_y),
        x_name=name,
        y_name="top-1, %" if labelled else "SQNR of the logits, dB",
        width=560,
    )
    titles = [f"{row.name}: {x:.3g}, {y:.2f}" for x, y, row in kept]
    best = {(x, y) for x, y, _ in kept if not any(a <= x and b > y for a, b, _ in kept)}
    front = sorted(best)
    plot.line(front, 1, "best for its price", dots=False)
    plot.dots([(x, y) for x, y, _ in kept], 0, "a row of the study", titles=titles)
    if len(kept) <= 12:
        for x, y, row in kept:
            plot.text((x, y), row.name)
    return plot.render()


def _reached(row: SweepRow, labelled: bool) -> float:
    assert row.evaluation is not None
    if labelled:
        return 100 * (row.evaluation.top1 or 0.0)
    return math.inf if row.evaluation.sqnr_db is None else row.evaluation.sqnr_db


def _bits(row: SweepRow) -> float | None:
    if row.name == "float":
        return 32.0
    bits = row.changes.get("weights.bits")
    return float(bits) if isinstance(bits, (int, float)) else None


def _image(change: Change, batches: ImageBatches | None) -> str:
    name = f"image {change.image}" if batches is None else batches.images.names[change.image]
    words = f"{change.reference} in float, {change.found} quantized"
    words += "" if change.label is None else f"; label {change.label}"
    picture = ""
    if batches is not None:
        image = batches.images.open(change.image).convert("RGB")
        image.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    short = escape(Path(name).name)
    return f"<figure>{picture}<figcaption>{short}<br>class {words}</figcaption></figure>"
