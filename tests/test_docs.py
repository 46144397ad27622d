"""What the pages name is there, and the code that they show is the tests'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:fxquant|passes|tests|benchmarks|docs)/[\w/.]+)`", page.read_text())

    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())

    for path, heading in links:
        if "reference/" in path:
            continue  # made from the code: the build of the site checks these
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not heading or heading in _anchors(target), f"{path}#{heading}"


@pytest.mark.parametrize(("name", "least"), [("contributing.md", 6), ("native.md", 1)])
def test_every_example_of_the_worked_pages_is_a_tests_code(name: str, least: int) -> None:
    page = (ROOT / "docs" / name).read_text()
    tests = [_lines(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    examples = list(map(_lines, re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)))

    assert len(examples) >= least
    assert not [example for example in examples if not any(example in test for test in tests)]


def test_the_picture_of_the_rooms_is_the_import_contract() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text()
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    floors = [
        [room.strip().removeprefix("fxquant.") for room in floor.split("|")]
        for floor in re.findall(r'"(.*)"', contract)
    ]
    picture = page.partition("## The rooms")[2].split("```")[1].strip().splitlines()

    assert len(picture) == len(floors)
    for line, rooms in zip(picture, floors, strict=True):
        drawn = set(re.findall(r"\w+", line.replace(".py", "")))
        assert set(rooms) <= drawn, line


def _lines(code: str) -> str:
    """Without indentation and blank lines, which the formatter of pages sets by itself."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
