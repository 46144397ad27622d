"""The tutorials and the first page run as they stand, block by block."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fxquant.backends import available_targets
from fxquant.data import data_root

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "tutorials").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "data_root()" in page.read_text() and data_root() is None:
        pytest.skip("the real networks and images are not here; set $FXQUANT_DATA to them")
    monkeypatch.chdir(tmp_path)
    have = {"native": False, "onnx": find_spec("onnxruntime") is not None}
    assert run(page, have) > 3


@pytest.mark.slow
def test_the_c_plus_plus_of_a_tutorial_builds_and_tests_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = available_targets()["native"] or ("" if shutil.which("cmake") else "there is no cmake")
    if reason:
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
    assert run(DOCS / "tutorials" / "cnn.md", {"native": True, "onnx": False}) > 6
    assert (tmp_path / "build" / "selftest").is_file()


def run(page: Path, have: dict[str, bool]) -> int:
    """Run the blocks of a page that need nothing but what is here; how many there were."""
    names: dict[str, Any] = {"__name__": page.stem}
    count = 0
    pattern = r"^```(python|bash)([^\n]*)\n(.*?)^```"
    for language, info, code in re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
        if not all(have[need] for need in re.findall(r"needs-(\w+)", info)):
            continue
        count += 1
        if language == "bash":
            subprocess.run(["bash", "-euc", code], check=True)
        else:
            exec(compile(code, str(page), "exec"), names)
    return count
