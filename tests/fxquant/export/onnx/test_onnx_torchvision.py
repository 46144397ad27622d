"""The networks of torchvision, with random weights, as ONNX files that ONNX Runtime loads.

A part of them runs with ``-m slow -k resnet``.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime
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
    size = 224 if name.startswith(FIXED_SIZE) else 96 if name.startswith("inception") else 64
    check_network(tmp_path / "m.onnx", name, recipe, size, not name.startswith(TRANSFORMERS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "operators", "stored"),
    [
        ("w4a8", {"DequantizeLinear", "QuantizeLinear"}, "INT4"),
        ("w4a32", {"DequantizeLinear"}, "INT4"),
        ("dynamic_w8a8", {"DynamicQuantizeLinear", "MatMulInteger"}, "INT8"),
        ("w8a8_onnx", {"DequantizeLinear", "QuantizeLinear"}, "INT8"),
    ],
)
def test_other_recipes_become_files(
    tmp_path: Path, recipe: str, operators: set[str], stored: str
) -> None:
    torch.manual_seed(0)
    model = load_model("torchvision:resnet18")
    x = batch("resnet18", 96)
    q = fxquant.compile(model, recipe, calibration=x, target="reference")
    report = q.export_onnx(tmp_path / "m.onnx")
    assert operators <= set(report.operators)
    weights = ir.load(tmp_path / "m.onnx").graph.initializers.values()
    assert stored in {value.dtype.name for value in weights if len(value.shape) > 1}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.run(None, {"x": x[:1].numpy()})[0].shape == (1, 1000)
