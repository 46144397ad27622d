"""The networks of torchvision, with random weights, compile and run on x86."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

import fxquant
from fxquant.errors import ArtifactError
from fxquant.frontend.models import load_model
from passes.infra.verify import flatten

# Small versions of what there is: inverted residuals, squeeze-and-excitation, dense and fire
# blocks, channel shuffles, inception branches, plain chains.
QUICK = {
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "googlenet": 64,
    "efficientnet_b0": 64,
    "resnet18": 64,
}
TRANSFORMERS = ("vit", "swin", "maxvit")
FIXED_SIZE = ("vit", "maxvit")


def batch(name: str, size: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(count, 3, size, size, generator=generator)


def compiles_and_runs(name: str, size: int) -> fxquant.CompiledModel:
    model = load_model(f"torchvision:{name}")
    x = batch(name, size)
    q = fxquant.compile(model, "w8a8", calibration=x)
    with torch.no_grad():
        expected, found = model(x[:1]), q(x[:1])
    assert type(expected) is type(found)
    for (_, a), (_, b) in zip(flatten(expected), flatten(found), strict=True):
        assert a.shape == b.shape
        assert b.isfinite().all()
    assert q.report.target_check["largest_difference"] <= 1
    return q


@pytest.mark.parametrize("name", QUICK)
def test_small_networks_run_on_integers(name: str) -> None:
    q = compiles_and_runs(name, QUICK[name])
    assert q.report.int8_share >= 0.99


def test_a_network_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    q = compiles_and_runs("mobilenet_v3_small", 64)
    q.save(tmp_path / "m.fxq")
    x = batch("other", 64, 3)
    assert torch.equal(fxquant.load(tmp_path / "m.fxq")(x), q(x))


def test_a_transformer_says_why_parts_stay_float() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(x)

    q = fxquant.compile(Block().eval(), "w8a8", calibration=torch.randn(2, 5, 16))
    assert q.report.int8_share == 1
    assert any(row.runs_in == "float" for row in q.report.coverage)
    assert all(row.reason for row in q.report.coverage if row.runs_in == "float")


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_all_networks_run(name: str, tmp_path: Path) -> None:
    size = 224 if name.startswith(FIXED_SIZE) else 96
    q = compiles_and_runs(name, size)
    if not name.startswith(TRANSFORMERS):
        assert q.report.int8_share >= 0.99
    assert all(row.reason for row in q.report.coverage if row.runs_in == "float")
    try:
        q.save(tmp_path / "m.fxq")
    except ArtifactError as error:
        pytest.fail(str(error))
    x = batch(name, size, 1)
    for (_, a), (_, b) in zip(
        flatten(fxquant.load(tmp_path / "m.fxq")(x)), flatten(q(x)), strict=True
    ):
        assert torch.equal(a, b)
