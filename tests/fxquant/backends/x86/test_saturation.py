"""Where a CPU adds pairs of products in 16 bits, layers that could saturate lose one bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fxquant.backends.x86.saturation import pair_sums_fit
from tests.fxquant.small_networks import compiled, conv_net


@pytest.fixture
def _no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.backends.x86.saturation.kernels_saturate", lambda: True)


def largest(q: object, path: str = "0") -> int:
    weight = q.stages["integer"].get_buffer(f"{path}.weight")  # type: ignore[attr-defined]
    return int(weight.abs().max())


@pytest.mark.parametrize(
    ("pair", "fits"),
    [((64, 64), True), ((64, 65), False), ((-64, -64), True), ((-64, -65), False),
     ((127, -127), True), ((127, 1), True), ((127, 2), False)],
)  # fmt: skip
def test_pairs_of_one_sign_must_fit(pair: tuple[int, int], fits: bool) -> None:
    # 255 · 128 = 32,640 is within int16, 255 · 129 = 32,895 is not.
    assert pair_sums_fit(torch.tensor(pair, dtype=torch.int8).view(1, 2, 1, 1)) is fits


def test_channels_pair_up_from_the_first() -> None:
    weight = torch.tensor([10, 120, 110, 10], dtype=torch.int8).view(1, 4, 1, 1)
    assert not pair_sums_fit(weight)
    assert pair_sums_fit(weight[:, [0, 3, 1]])


def test_single_values_cannot_saturate() -> None:
    assert pair_sums_fit(torch.full((4, 1, 3, 3), 127, dtype=torch.int8))


@pytest.mark.usefixtures("_no_vnni")
def test_a_layer_that_could_saturate_has_7_bits_and_a_note() -> None:
    model = conv_net()
    model[0].weight.data.fill_(0.1)
    q = compiled(model)
    assert largest(q) == 63
    (note,) = [note for note in q.report.notes if "7 bits" in note]
    assert note.startswith("0: weights in 7 bits")
    assert "VNNI" in note
    assert note in str(q.report)


@pytest.mark.usefixtures("_no_vnni")
def test_a_layer_that_fits_keeps_its_bits() -> None:
    model = conv_net()
    model[0].weight.data[:, 1] = 0.0
    q = compiled(model)
    assert largest(q) == 127
    assert not any("7 bits" in note for note in q.report.notes)


@pytest.mark.usefixtures("_no_vnni")
def test_the_reference_never_saturates() -> None:
    model = conv_net()
    model[0].weight.data.fill_(0.1)
    assert largest(compiled(model, target="reference")) == 127


@pytest.mark.usefixtures("_no_vnni")
def test_depthwise_layers_keep_their_bits() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3)).eval()
    model[0].weight.data.fill_(0.1)
    assert largest(compiled(model)) == 127


def test_with_vnni_nothing_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.backends.x86.saturation.kernels_saturate", lambda: False)
    model = conv_net()
    model[0].weight.data.fill_(0.1)
    assert largest(compiled(model)) == 127


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_kernels_held_below_vnni_are_found_out(isa: str) -> None:
    code = "from fxquant.backends.x86.saturation import kernels_saturate as f; print(f())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"
