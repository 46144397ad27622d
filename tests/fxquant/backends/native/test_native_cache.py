"""What is built once is kept: privately, whole or not at all, and checked before it is loaded."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxquant.backends.native import build as module
from fxquant.backends.native.build import build, cache_folder, stored
from fxquant.backends.native.target import Native
from fxquant.errors import TargetError

UNIT = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if module.why_unavailable():
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))


def test_the_folder_is_the_user_s_alone() -> None:
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700


def test_a_folder_that_others_can_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700


def test_what_is_built_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(UNIT)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the compiler was called again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert build(UNIT) == path


def test_a_damaged_library_is_built_again() -> None:
    path = build(UNIT)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    assert build(UNIT) == path
    assert path.read_bytes() != whole[:-1] + b"?"


def test_a_damaged_program_is_written_again() -> None:
    path = stored("some.bin", b"steps")
    path.write_bytes(b"other")
    assert stored("some.bin", b"steps").read_bytes() == b"steps"


def test_nothing_is_left_of_an_interrupted_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TargetError, match=r"No space left.*make room"):
        stored("some.bin", b"steps")
    assert list(cache_folder().iterdir()) == []


def test_a_failing_compiler_is_quoted() -> None:
    with pytest.raises(TargetError, match=r"the C\+\+ compiler failed.*\n(.*\n)*.*nonsense"):
        build("nonsense\n")


def test_without_a_compiler_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "apt install g++" in Native().unavailable()
    with pytest.raises(TargetError, match=r"/nowhere/c\+\+.*apt install g\+\+"):
        build(UNIT)


def test_two_processes_that_build_the_same_both_succeed() -> None:
    code = f"from fxquant.backends.native.build import build; print(build({UNIT!r}))"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert found[0] == found[1]
    assert Path(found[0]).exists()
