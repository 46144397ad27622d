"""What keeps a unit from being built says why, and leaves nothing behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fxquant.backends.native import build
from fxquant.errors import TargetError

UNIT = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
needs_compiler = pytest.mark.skipif(bool(build.why_unavailable()), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FXQUANT_CACHE", str(folder))
    return folder


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def assert_empty(cache: Path) -> None:
    assert not cache.exists() or not os.listdir(cache)


@needs_compiler
def test_another_unit_or_compiler_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.build(UNIT)
    assert build.build(UNIT.replace("42", "43")) != library
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert build.build(UNIT) != library


def test_a_cache_of_somebody_else_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(TargetError, match=r"belongs to another user.*set FXQUANT_CACHE"):
        build.cache_folder()


def test_a_cache_that_cannot_be_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(TargetError, match=r"cannot be used.*set FXQUANT_CACHE"):
        build.cache_folder()


def test_a_compiler_that_fails_shows_its_last_lines(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, "seq 100 >&2; echo it went wrong >&2; exit 3")
    with pytest.raises(TargetError) as caught:
        build.build(UNIT)
    lines = str(caught.value).splitlines()
    assert "compiler failed" in lines[0]
    assert "exit 3" in lines[0]
    assert lines[-1] == "it went wrong"
    assert "50" not in lines
    assert_empty(cache)


def test_a_compiler_that_writes_nothing_is_an_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(TargetError, match="compiler failed"):
        build.build(UNIT)
    assert_empty(cache)


def test_a_compiler_that_cannot_run_is_an_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compiler"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(TargetError, match="does not run"):
        build.build(UNIT)
    assert_empty(cache)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow: what a write then raises is an OSError as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_do_not_fit_on_the_disk_are_an_error(cache: Path) -> None:
    with full_disk(), pytest.raises(TargetError, match=r"cannot write .*weights\.bin.*make room"):
        build.stored("weights.bin", b"0" * 4096)
    assert_empty(cache)


@needs_compiler
def test_a_unit_that_does_not_fit_on_the_disk_is_an_error(cache: Path) -> None:
    with full_disk(), pytest.raises(TargetError, match="make room"):
        build.build(UNIT)
    assert_empty(cache)
