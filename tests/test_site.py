"""The documentation builds without a warning, and what is made from the code is whole."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fxquant
import passes
from fxquant.cli.app import COMMANDS
from fxquant.kernels.schema import OPERATORS
from fxquant.recipe import Recipe, names

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "_generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_offline_with_warnings_as_errors(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'(?:src|<link[^>]* href)="(https?:[^"]*)"', page.read_text())
        assert [address for address in loaded if "canonical" not in address] == [], page


def test_a_page_that_the_navigation_does_not_name_stands_behind_the_guides(
    generated: ModuleType,
) -> None:
    config = importlib.import_module("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"))
    (guides,) = (section["Guides"] for section in config.nav if "Guides" in section)
    (native,) = (page for page in guides if "native.md" in page.values())
    guides.remove(native)
    generated.on_config(config)
    assert guides[-1] == native


def test_every_pass_is_there_with_its_docstring(generated: ModuleType) -> None:
    page = generated.pass_pages()
    kinds = {kind.name for kind in generated.all_passes()}
    assert {"canonicalize", "fold_batch_norm", "correct_bias", "smooth_quant"} <= kinds
    assert {f"## {name}\n" in page for name in kinds} == {True}
    drawn = inspect.getdoc(passes.FoldBatchNorm)
    assert drawn is not None
    assert drawn in page


def test_every_operator_command_and_public_name_is_there(generated: ModuleType) -> None:
    for page, wanted in (
        (generated.operators(), [operator.name for operator in OPERATORS]),
        (generated.command_line(), list(COMMANDS)),
        (generated.api(), [name for name in fxquant.__all__ if name != "__version__"]),
    ):
        assert [name for name in wanted if f"## {name}\n" not in page] == []


def test_every_recipe_and_every_key_is_there(generated: ModuleType) -> None:
    page = generated.recipes()
    assert [name for name in names.file_names() if f"## {name}\n" not in page] == []
    keys = [
        f"{table}.{key}" if table else key
        for table, keys in (("", Recipe().to_dict()), ("weights", Recipe().to_dict()["weights"]))
        for key, value in keys.items()
        if not isinstance(value, dict) and key != "overrides"
    ]
    assert [key for key in keys if f"| `{key}` |" not in page] == []
