"""One library of all kernels for all tests: building one for each network would take minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.backends.native import build, executor
from fxquant.backends.native.params import params_types
from fxquant.backends.native.unit import unit_text
from tests.fxquant.backends.native.kernels import SANITIZERS


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests of a session share."""
    return tmp_path_factory.mktemp("native")


@pytest.fixture
def native(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs find their kernels in one library; skipped where nothing can be built."""
    reason = build.why_unavailable()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("FXQUANT_CACHE", str(shared_cache))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *SANITIZERS))
    monkeypatch.setattr(executor, "unit_text", lambda kernels: unit_text(params_types()))
