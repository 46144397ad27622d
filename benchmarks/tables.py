"""Writes the tables of README and docs from benchmarks/results/, between their markers.

    python -m benchmarks.tables [--check]

A table stands between ``<!-- table NAME -->`` and ``<!-- end of table -->``. `TABLES` says what is
in each: a cell is the row of a recipe in the newest result file that has it for a network.
`--check` writes nothing and fails where a page and its files differ.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import low_bit
from benchmarks.results import FOLDER

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/low_bit.md")


@dataclass(frozen=True)
class Table:
    """Rows by columns of recipes, as ``(title, network, recipes)``; "" leaves a cell empty."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]

    def text(self, measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
        """The table as Markdown: top-1 in percent and the logits' SQNR in dB."""
        lines = [
            [title, *(_cell(measured, network, recipe) for recipe in recipes)]
            for title, network, recipes in self.rows
        ]
        return tabulate(lines, headers=["", *self.columns], tablefmt="github")


_RESNET20 = ("w4a32", "w4a8", "w4a4_head_stem8", "w2a4_head_stem8")
TABLES = {
    "resnet20": Table(
        ("W4A32", "W4A8", "W4A4", "W2A4"),
        (
            ("nearest", "cifar_resnet20", _RESNET20),
            ("GPTQ", "cifar_resnet20", tuple(f"{name}_gptq" for name in _RESNET20)),
        ),
    ),
}


def _cell(measured: Mapping[tuple[str, str], Mapping[str, Any]], network: str, recipe: str) -> str:
    if not recipe:
        return ""
    row = measured[network, recipe]
    return f"{100 * row['top1']:.2f}, {row['sqnr_db']:.1f}"


def rows_of_files() -> dict[tuple[str, str], Mapping[str, Any]]:
    """The rows of `benchmarks.low_bit`, by network and recipe; of several the newest.

    Raises:
        ValueError: the command of a file does not give its rows.
    """
    measured = {}
    for path in sorted(FOLDER.glob("*-low-bit-*.json")):
        content = json.loads(path.read_text())
        network, recipes = asked(content["command"])
        found = [row["recipe"] for row in content["results"]]
        if found != list(recipes[: len(found)]) or not found:
            raise ValueError(f"{path.name}: holds {found}, its command asks for {recipes}")
        measured |= {(network, row["recipe"]): row for row in content["results"]}
    return measured


def asked(command: str) -> tuple[str, Sequence[str]]:
    """Network and recipes of a command line of `benchmarks.low_bit` that writes its rows.

    Raises:
        ValueError: it is none, or one that writes nothing.
    """
    words = shlex.split(command)
    if words[:3] != ["python", "-m", "benchmarks.low_bit"]:
        raise ValueError(f"{command!r} is no command of benchmarks.low_bit")
    arguments = low_bit.parser().parse_args(words[3:])
    if not arguments.write:
        raise ValueError(f"{command!r} writes nothing: --write is missing")
    return arguments.name, arguments.recipes


def generated(page: str, measured: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The text of a page with every table as the files have it."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]].text(measured)}\n{match[4]}"

    pattern = r"(<!-- table (\w+) -->)\n(.*?)(<!-- end of table -->)"
    return re.sub(pattern, table, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    measured = rows_of_files()
    for name in PAGES:
        path = ROOT / name
        before = path.read_text()
        after = generated(before, measured)
        if check and before != after:
            sys.exit(f"{name} differs from benchmarks/results: run python -m benchmarks.tables")
        if before != after:
            path.write_text(after)


if __name__ == "__main__":
    main()
