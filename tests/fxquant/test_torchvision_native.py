"""The networks of torchvision, with random weights, give the reference's bits on native.

A part of them runs with ``-m slow -k resnet``.
"""

from __future__ import annotations

import pytest
import torch
from torchvision import models

import fxquant
from fxquant.frontend.models import load_model
from passes.infra.verify import flatten
from tests.fxquant.test_torchvision import FIXED_SIZE, batch

pytestmark = pytest.mark.usefixtures("native")
# Attention and layer norms compute in integers alone under this recipe.
TRANSFORMERS = ("vit", "swin", "convnext", "maxvit")


def check_network(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}")
    x = batch(name, size)
    recipe = "vit_w8a8_integer" if name.startswith(TRANSFORMERS) else "w8a8"
    native = fxquant.compile(model, recipe, calibration=x, target="native")
    assert not any("no kernel" in note for note in native.report.target_notes)
    image = batch("another", size, 1)
    expected = native.to_target("reference")(image)
    for (path, want), (_, got) in zip(flatten(expected), flatten(native(image)), strict=True):
        assert torch.equal(want, got), path


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_small_networks_give_the_reference_s_bits(name: str) -> None:
    check_network(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_network_gives_the_reference_s_bits(name: str) -> None:
    check_network(name, 224 if name.startswith(FIXED_SIZE) else 96)
