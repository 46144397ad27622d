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
def test_a_tutorial_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_native: Path
) -> None:
    text = page.read_text()
    if "data_root()" in text and data_root() is None:
        pytest.skip("the real networks and images are not here; set $FXQUANT_DATA to them")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FXQUANT_CACHE", str(shared_native))
    deploys = not available_targets()["native"] and shutil.which("cmake") is not None
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = re.findall(r"^```(python|bash)([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 3
    for language, info, code in blocks:
        missing = {"native": not deploys, "onnx": find_spec("onnxruntime") is None}
        if any(missing[need] for need in re.findall(r"needs-(\w+)", info)):
            continue
        if language == "bash":
            subprocess.run(["bash", "-euc", code], cwd=tmp_path, check=True)
        else:
            exec(compile(code, str(page), "exec"), names)


@pytest.fixture(scope="session")
def shared_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")
