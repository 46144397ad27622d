"""No kernel reads or writes where it must not: the driver's random layers under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.native_kernels import SANITIZE, build
from tests.fxquant.backends.native.kernels import compiler


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_random_layers_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    driver = build(tmp_path, *SANITIZE)
    for seed in ("0", "1", "2"):
        result = subprocess.run([driver, "check", seed], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr[-2000:]
