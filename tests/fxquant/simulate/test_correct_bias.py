"""Rounded weights leave the mean of a layer's output where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fxquant.small_networks import compiled, images, module

LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(4, 6, 1),
    "without bias": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 1, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 1),
    "transposed and grouped": lambda: nn.ConvTranspose2d(4, 6, 1, groups=2),
    "strided transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
}


def means(value: Tensor) -> Tensor:
    return value.double().mean((0, 2, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_of_the_output_is_kept(name: str) -> None:
    layer = nn.Sequential(LAYERS[name]()).eval()
    x = images(channels=4).abs()
    # Float activations, so that nothing but the weights is rounded.
    coarse = {"weights.bits": 4, "weights.granularity": "per_tensor"}
    off, on = (
        compiled(layer, {**coarse, "bias_correction": corrected}, recipe="w8a32", calibration=x)
        for corrected in (False, True)
    )
    expected = means(layer(x))
    assert (means(on(x)) - expected).abs().max() < 1e-5
    assert (means(off(x)) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["plain", "without bias", "grouped"])
def test_the_mean_of_the_output_is_kept_behind_gptq_too(name: str) -> None:
    layer = nn.Sequential(LAYERS[name]()).eval()
    x = images(channels=4).abs()
    changes = {"weights.bits": 2, "reconstruction.method": "gptq"}
    off, on = (
        compiled(layer, {**changes, "bias_correction": corrected}, recipe="w8a32", calibration=x)
        for corrected in (False, True)
    )
    expected = means(layer(x))
    assert (means(on(x)) - expected).abs().max() < 1e-5
    assert (means(off(x)) - expected).abs().max() > 1e-4


def test_a_linear_layer_over_tokens() -> None:
    layer = nn.Sequential(nn.Linear(6, 5)).eval()
    x = torch.randn(3, 7, 6) + 1
    q = compiled(layer, {"weights.bits": 3, "bias_correction": True}, recipe="w8a32", calibration=x)
    assert torch.allclose(q(x).mean((0, 1)), layer(x).mean((0, 1)), atol=1e-5)


def test_the_stages_before_keep_their_biases() -> None:
    q = compiled(changes={"bias_correction": True, "weights.bits": 3})
    fused, simulated = (q.stages[s].get_submodule("conv1").layer for s in ("fused", "simulated"))
    assert not torch.equal(fused.bias, simulated.bias)  # type: ignore[union-attr,arg-type]


def test_the_report_says_so() -> None:
    assert "bias correction: 4 layers" in compiled(changes={"bias_correction": True}).report.notes


def test_a_layer_whose_output_is_normalized_keeps_its_bias() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        k = F.normalize(self.k(x).reshape(2, 5, 4), dim=-1)
        return self.out(k)

    torch.manual_seed(0)
    model = module(forward, k=nn.Linear(4, 4, bias=False), out=nn.Linear(4, 4, bias=False))
    q = compiled(model, calibration=torch.randn(2, 5, 4).abs())
    simulated: Any = q.stages["simulated"]
    assert simulated.k.layer.bias is None
    assert simulated.out.layer.bias is not None
