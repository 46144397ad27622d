"""Whatever is typed, the answer is a result, or one line and exit code 2: never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.torch import save_file

from fxquant.cli import main
from fxquant.frontend.models import load_model
from tests.fxquant.fuzzing import command_lines

pytestmark = pytest.mark.filterwarnings("ignore")

NETWORK = """
from torch import nn

def net(num_classes=4):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, num_classes))
"""
MODEL = "network_of_fuzzed_commands:net"
PIXELS = ("--preprocessing", "none", "--quiet")
DATA = ("--calibration", "images", "--images", "2", *PIXELS)
RIGHT = (
    ("compile", MODEL, "--target", "reference", *DATA),
    ("compile", MODEL, "--evaluate", "images", "--max-drop", "100", *DATA),
    ("compile", MODEL, "--save", "new.fxq", "--set", "weights.bits=4", *DATA),
    ("compile", MODEL, "--weights", "w.safetensors", "--min-sqnr", "3", "--diff", *DATA),
    ("evaluate", "m.fxq", "images", *PIXELS),
    ("evaluate", MODEL, "images", "--reference", MODEL, "--classes", "4", *PIXELS),
    ("inspect", "m.fxq", "--stage", "integer"),
    ("compare", MODEL, *DATA),
    ("bench", MODEL, "--input-shape", "3,12,12", "--rounds", "1", "--calls", "1", "--quiet"),
    ("recipes", "w4a8", "--set", "weights.bits=3"),
    ("recipes",),
    ("recipes", "auto", MODEL, "--ratio", "5", "--bits", "4", "8", *DATA),
    ("sensitivity", MODEL, "--bits", "4", "--recipe", "w4a8", *DATA),
    ("blocks", MODEL, "--input-shape", "3,12,12", "--quiet"),
    ("sweep", "fusion", MODEL, "--evaluate", "images", "--limit", "1", *DATA),
    ("models", "mobilenet*"),
    ("export", "m.fxq", "--cpp", "images"),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a network, weights, four labelled images and a saved file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, MODEL.partition(":")[0], raising=False)
    (tmp_path / "network_of_fuzzed_commands.py").write_text(NETWORK)
    (tmp_path / "images").mkdir()
    random = numpy.random.RandomState(0)
    for index in range(4):
        pixels = random.randint(0, 256, (12, 12, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:02}.png")
    rows = "".join(f"{index:02}.png,{index}\n" for index in range(4))
    (tmp_path / "images" / "labels.csv").write_text(f"file,label\n{rows}")
    save_file(dict(load_model(MODEL).state_dict()), tmp_path / "w.safetensors")
    assert main(["compile", MODEL, "--save", "m.fxq", *DATA]) == 0
    return tmp_path


@pytest.mark.parametrize(("count", "seed"), [(50, 0), pytest.param(200, 1, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], count: int, seed: int
) -> None:
    found = {}
    for words in command_lines(count, seed, RIGHT):
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        except Exception as error:
            found[" ".join(words)] = f"{type(error).__name__}: {error}"
            continue
        printed = capsys.readouterr().err
        if code not in (0, 1, 2) or "Traceback" in printed:
            found[" ".join(words)] = f"exit code {code}: {printed}"
    assert not found, "\n".join(f"fxquant {words}\n    {what}" for words, what in found.items())
