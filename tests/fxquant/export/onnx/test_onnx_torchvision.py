"""The networks of torchvision, with random weights, as ONNX files that ONNX Runtime loads.

A part of them runs with ``-m slow -k resnet``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision import models

import fxquant
from fxquant.frontend.models import load_model
from tests.fxquant.test_torchvision import FIXED_SIZE, batch

TRANSFORMERS = ("vit", "swin", "convnext", "maxvit")


def check_network(path: Path, name: str, recipe: str, size: int, exact: bool) -> None:
    """The export itself runs the file, and compares every operator with the reference."""
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}")
    calibration = batch(name, size)
    q = fxquant.compile(model, recipe, calibration=calibration, target="reference")
    report = q.export_onnx(path, form="qoperator" if exact else "qdq", exact=exact)
    assert path.is_file()
    assert report.notes == (), "the batch is not free"
    bounded = [check for check in report.checks if check.allowed is not None]
    assert len(bounded) == (3 if exact else 2)
    assert all(check.values for check in bounded)


@pytest.mark.parametrize("exact", [False, True])
def test_a_small_network_of_torchvision_becomes_a_file(tmp_path: Path, exact: bool) -> None:
    check_network(tmp_path / "m.onnx", "mobilenet_v3_small", "w8a8", 64, exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_network_of_torchvision_becomes_a_file(tmp_path: Path, name: str) -> None:
    recipe = "vit_w8a8" if name.startswith(TRANSFORMERS) else "w8a8"
    size = 224 if name.startswith(FIXED_SIZE) else 96
    check_network(tmp_path / "m.onnx", name, recipe, size, not name.startswith(TRANSFORMERS))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a8", "dynamic_w8a8", "w8a8_onnx", "w4a32"])
def test_other_recipes_become_files(tmp_path: Path, recipe: str) -> None:
    torch.manual_seed(0)
    model = load_model("torchvision:resnet18")
    x = batch("resnet18", 96)
    q = fxquant.compile(model, recipe, calibration=x, target="reference")
    q.export_onnx(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").is_file()
