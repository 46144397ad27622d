"""Address and undefined-behaviour sanitizers find nothing in the kernels and in the runtime.

Torch's memory is the sanitizers' as well: a kernel that touches what lies behind a tensor of the
caller ends the process. The small set of every day is the self test of an exported network
(`tests/fxquant/export/test_cpp.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fxquant.backends.native.kernels import SANITIZERS, compiler

HERE = Path(__file__).parent
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime(name: str) -> str:
    """The file of a sanitizer's runtime, which must be loaded before everything else."""
    chosen = compiler()
    if chosen is None:
        pytest.skip("needs a C++ compiler")
    asked = [chosen, f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{chosen} has no {name}")
    return found


def run_sanitized(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The compiler itself runs without them: they make it ten times slower.
    plain = folder / "compiler"
    plain.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {compiler()} "$@"\n')
    plain.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(plain),
        "FXQUANT_TEST_SANITIZERS": FLAGS,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # What Python and torch still hold at the end is theirs.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(SANITIZERS), reason="is running")
@pytest.mark.parametrize(
    "name",
    [
        "test_native_kernels.py",
        "test_native_elementwise.py",
        "test_native_float_kernels.py",
        "test_native_convolutions.py",
        "test_native_networks.py",
        "test_native_floats.py",
    ],
)
def test_sanitizers_find_nothing(name: str, tmp_path: Path) -> None:
    options = ("-q", "-x", "-s", "-p", "no:cacheprovider")
    done = run_sanitized(tmp_path, "-m", "pytest", *options, str(HERE / name))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.skipif(bool(SANITIZERS), reason="is running")
def test_sanitizers_find_what_is_read_behind_a_tensor(tmp_path: Path) -> None:
    lines = (
        "import ctypes, torch",
        "from tests.fxquant.backends.native import kernels",
        "x, y = torch.zeros(1, 3, 4, 4), kernels.Image((1, 3, 4, 4))",
        "sizes = dict(batch=1, height=4, width=4, channels=3, fill_channels=3)",
        "x_strides = dict(x_batch=48, x_row=4, x_column=1, x_channel=16 * 9)",
        "y_strides = dict(y_batch=y.batch, y_row=y.row, y_pixel=y.pixel)",
        "kernels.call('portable', 'quantize', x=x, y=y.address(), hi=255,"
        " **sizes, **x_strides, **y_strides)",
    )
    done = run_sanitized(tmp_path, "-c", "\n".join(lines))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
