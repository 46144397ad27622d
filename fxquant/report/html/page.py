"""The frame of a page: one file with its style and script inside, and the parts of a body."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from fxquant.errors import DataError
from fxquant.version import __version__

__all__ = ["Section", "cards", "details", "table", "write_page"]


@dataclass(frozen=True)
class Section:
    """A part of a page: its heading, which also names its anchor, and its HTML."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """The heading as the address within the page."""
        return self.title.lower().replace(" ", "-")


def write_page(path: str | Path, title: str, about: str, sections: Sequence[Section]) -> None:
    """Write one self-contained file, under another name first. Raises DataError where it cannot."""
    path = Path(path)
    shown = [section for section in sections if section.body]
    links = "".join(f'<li><a href="#{each.anchor}">{escape(each.title)}</a></li>' for each in shown)
    bodies = "".join(
        f'<section id="{each.anchor}"><h2>{escape(each.title)}</h2>{each.body}</section>'
        for each in shown
    )
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_resource("page.css")}</style>
</head>
<body>
<a class="skip" href="#content">To the content</a>
<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="content">{bodies}</main>
<footer>fxquant {escape(__version__)}</footer>
<script>{_resource("page.js")}</script>
</body>
</html>
"""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def cards(facts: Iterable[tuple[str, str]]) -> str:
    """Figures with their names, large."""
    return (
        '<dl class="cards">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts
        )
        + "</dl>"
    )


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1, sort: bool = False
) -> str:
    """A table whose first `texts` columns are text and whose others are figures on the right.

    Cells are escaped, except those of `Markup`. `sort` makes the headers buttons.
    """
    kinds = ["text" if index < texts else "figure" for index in range(len(headers))]
    head = "".join(
        f'<th scope="col" class="{kind}">'
        + (f'<button type="button">{escape(name)}</button>' if sort and name else escape(name))
        + "</th>"
        for name, kind in zip(headers, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{cell if isinstance(cell, Markup) else escape(str(cell))}</td>'
            for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    label = escape(headers[0] or "table")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str, *, anchor: str = "", opened: bool = False) -> str:
    """Something folded; `summary` and `body` are HTML."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return (
        f"<details{name}{' open' if opened else ''}><summary>{summary}</summary>"
        f'<div class="folded">{body}</div></details>'
    )


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def _resource(name: str) -> str:
    return files("fxquant.report.html").joinpath(name).read_text(encoding="utf-8")
