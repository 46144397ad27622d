"""The tables of the pages are what the result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables

PAGES = [tables.ROOT / name for name in tables.PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_files(page: Path) -> None:
    assert page.read_text() == tables.generated(page.read_text())


def test_every_table_stands_on_a_page() -> None:
    marked = {
        name for page in PAGES for name in re.findall(r"<!-- table (\w+) -->", page.read_text())
    }
    assert marked == set(tables.TABLES)


@pytest.mark.parametrize("name", tables.TABLES)
def test_an_edited_figure_of_any_table_is_found(name: str) -> None:
    text = next(p.read_text() for p in PAGES if f"<!-- table {name} -->" in p.read_text())
    before, table, after = text.partition(f"<!-- table {name} -->")
    digit = re.search(r"\d+\.\d+", after)
    assert digit is not None
    edited = before + table + after.replace(digit[0], "99.99", 1)
    assert edited != text
    assert tables.generated(edited) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_of_measured_figures_is_typed(page: Path) -> None:
    text = re.sub(r"<!-- table .*?<!-- end of table -->", "", page.read_text(), flags=re.DOTALL)
    rows = re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)
    assert [row for row in rows if re.search(r"\d+\.\d+ (dB|%|MB)", row)] == []


def test_a_command_that_writes_nothing_has_no_result_file() -> None:
    with pytest.raises(ValueError, match="--write is missing"):
        tables.asked("python -m benchmarks.low_bit vit_tiny --recipes vit_w4a4")
    command = "python -m benchmarks.low_bit vit_tiny --recipes vit_w4a4 vit_w4a4_gptq --write"
    assert tables.asked(command) == ("vit_tiny", [("vit_w4a4", 0), ("vit_w4a4_gptq", 0)])


def test_a_file_whose_rows_its_command_does_not_give_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    (tmp_path / "2026-01-01-low-bit-x.json").write_text(
        '{"command": "python -m benchmarks.low_bit vit_tiny --recipes vit_w4a4 --write",'
        ' "results": [{"recipe": "vit_w4a4_gptq", "seed": 0}]}'
    )
    with pytest.raises(ValueError, match="its command asks for"):
        tables.rows_of_files()


def test_the_rows_of_several_seeds_are_one_figure_with_its_spread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    command = "python -m benchmarks.low_bit vit_tiny --recipes vit_w4a4 --seeds 0 1 --write"
    rows = [
        {"recipe": "vit_w4a4", "seed": 0, "float_top1": 0.8, "top1": 0.7, "sqnr_db": 9.0},
        {"recipe": "vit_w4a4", "seed": 1, "float_top1": 0.8, "top1": 0.72, "sqnr_db": 10.0},
    ]
    path = tmp_path / "2026-01-01-low-bit-x.json"
    path.write_text(json.dumps({"command": command, "results": rows}))
    assert "| ViT-Tiny | `vit_w4a4` |  | 80.00 | 71.00 ± 1.41, 9.5 |" in tables.low_bits()
