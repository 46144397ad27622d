"""A damaged program is refused with a text, wherever the damage is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.backends.native import executor, params
from fxquant.backends.native.build import cache_folder
from fxquant.backends.native.library import Program
from fxquant.errors import TargetError

pytestmark = pytest.mark.usefixtures("native")
HEADER = 20 * 8


@pytest.fixture
def program() -> tuple[Path, bytes]:
    """The library of a small network, and the bytes of its program."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    q = fxquant.compile(model, "w8a8", calibration=torch.randn(2, 3, 8, 8), target="native")
    (segment,) = q.stages["native"].native_0.segments
    file = cache_folder() / segment.planned.program
    return segment.program.library, file.read_bytes()


def test_every_byte_is_covered_by_the_checksum(program: tuple[Path, bytes], tmp_path: Path) -> None:
    library, data = program
    draw = random.Random(0)
    places = [*range(HEADER), *(draw.randrange(HEADER, len(data)) for _ in range(50))]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        file = tmp_path / "damaged.bin"
        file.write_bytes(damaged)
        with pytest.raises(TargetError, match=r"is damaged|is no program"):
            Program(library, file)


@pytest.mark.parametrize("length", [0, 1, HEADER - 1, HEADER, 1000])
def test_a_truncated_program_is_refused(
    program: tuple[Path, bytes], tmp_path: Path, length: int
) -> None:
    library, data = program
    file = tmp_path / "short.bin"
    file.write_bytes(data[:length])
    with pytest.raises(TargetError, match=r"too short|is damaged"):
        Program(library, file)


def test_a_missing_program_is_refused(program: tuple[Path, bytes], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cannot open .*nowhere\.bin"):
        Program(program[0], tmp_path / "nowhere.bin")


def test_a_program_of_another_version_is_refused(
    program: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field of the parameters of `conv` has changed since the library was built."""
    library, _ = program
    layout = params.params_layout
    monkeypatch.setattr(
        "fxquant.backends.native.program.params_layout",
        lambda kernel: "0" * 16 if kernel == "conv" else layout(kernel),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    q = fxquant.compile(model, "w8a8", calibration=torch.randn(2, 3, 8, 8), target="native")
    (segment,) = q.stages["native"].native_0.segments
    planned = executor.plan_program(segment.graph_module, segment.shapes)
    file = tmp_path / "other.bin"
    file.write_bytes(planned.data)
    with pytest.raises(TargetError, match=r"different versions: .*kernel conv.*one export"):
        Program(library, file)
