"""Networks with real weights, on real images: natively the same integers, whole networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxquant
from benchmarks import real

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("native"),
    pytest.mark.skipif(not real.available(), reason="needs the real networks ($FXQUANT_DATA)"),
]
CNNS = [name for name in real.NETWORKS if name != "vit_tiny"]


def check(name: str, recipe: str, images: int) -> None:
    network = real.NETWORKS[name]
    calibration = network.calibration_batches(50)
    reference = fxquant.compile(network.load(), recipe, calibration=calibration, target="reference")
    native = reference.to_target("native")
    called = [note for note in native.report.target_notes if "Python calls torch" in note]
    # An average of floats is torch's own, whose order of summation is part of its result.
    assert all("adaptive_avg_pool2d" in note for note in called)
    seen = 0
    for batch in network.validation_batches(images, 10):
        x: Any = batch[0]
        assert torch.equal(native(x), reference(x))
        seen += len(x)
    assert seen == images


@pytest.mark.parametrize("name", CNNS)
def test_a_cnn_gives_the_reference_s_outputs_on_100_images(name: str) -> None:
    check(name, "w8a8", 100)


def test_vit_tiny_on_integers_alone_gives_the_reference_s_outputs() -> None:
    check("vit_tiny", "vit_w8a8_integer", 20)
