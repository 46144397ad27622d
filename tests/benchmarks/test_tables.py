"""The tables of the pages are what the result files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables

PAGES = [tables.ROOT / name for name in tables.PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_files(page: Path) -> None:
    assert page.read_text() == tables.generated(page.read_text(), tables.rows_of_files())


def test_every_table_stands_on_a_page() -> None:
    marked = {
        name for page in PAGES for name in re.findall(r"<!-- table (\w+) -->", page.read_text())
    }
    assert marked == set(tables.TABLES)


def test_an_edited_figure_is_found() -> None:
    measured = tables.rows_of_files()
    (page,) = [page.read_text() for page in PAGES if page.name == "low_bit.md"]
    before, table, after = page.partition("<!-- table resnet20 -->")
    digit = re.search(r"\d\d\.\d\d", after)
    assert digit is not None
    edited = before + table + after.replace(digit[0], "99.99", 1)
    assert tables.generated(edited, measured) != edited
    assert tables.generated(edited, measured) == page


def test_a_command_that_writes_nothing_has_no_result_file() -> None:
    with pytest.raises(ValueError, match="--write is missing"):
        tables.asked("python -m benchmarks.low_bit vit_tiny --recipes vit_w4a4")
    command = "python -m benchmarks.low_bit vit_tiny --recipes vit_w4a4 vit_w4a4_gptq --write"
    assert tables.asked(command) == ("vit_tiny", ["vit_w4a4", "vit_w4a4_gptq"])


def test_a_file_whose_rows_its_command_does_not_give_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    (tmp_path / "2026-01-01-low-bit-x.json").write_text(
        '{"command": "python -m benchmarks.low_bit vit_tiny --recipes vit_w4a4 --write",'
        ' "results": [{"recipe": "vit_w4a4_gptq"}]}'
    )
    with pytest.raises(ValueError, match="its command asks for"):
        tables.rows_of_files()
