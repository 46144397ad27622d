"""Operations between two convolutions: on integers, or in float with a reason and its cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant

X = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.between = between
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.LazyConv2d(4, 3)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


def compiled(between: Callable[..., Tensor], **parts: nn.Module) -> fxquant.CompiledModel:
    torch.manual_seed(0)
    model = Between(between, **parts).eval()
    model(X)
    return fxquant.compile(model, "w8a8", calibration=[X], target="reference")


@pytest.mark.parametrize(
    "between",
    [
        lambda s, x: x - torch.sigmoid(x),
        lambda s, x: F.glu(x, 1),
        lambda s, x: F.pixel_shuffle(x, 2),
        lambda s, x: F.pixel_unshuffle(x, 2),
        lambda s, x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
        lambda s, x: F.pad(x, (1, 1, 2, 1), mode="replicate"),
        lambda s, x: F.adaptive_max_pool2d(x, 4),
        lambda s, x: x.flip(2),
        lambda s, x: x.repeat(1, 1, 2, 1),
        lambda s, x: torch.stack([x.unbind(2)[row] for row in range(8)], 2),
    ],
)  # fmt: skip
def test_runs_on_integers(between: Callable[..., Tensor]) -> None:
    q = compiled(between)
    assert [row for row in q.report.coverage if row.runs_in != "int8"] == []


@pytest.mark.parametrize("slopes", [1, 8])
def test_a_prelu_runs_on_integers(slopes: int) -> None:
    q = compiled(lambda s, x: s.act(x), act=nn.PReLU(slopes))
    assert {row.runs_in for row in q.report.coverage} == {"int8"}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_convolution_that_pads_by_what_is_there_runs_on_integers(mode: str) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode)
    q = compiled(lambda s, x: s.c(x), c=conv)
    assert {row.runs_in for row in q.report.coverage} == {"int8"}


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        (nn.GroupNorm(2, 8), "GroupNorm normalizes by statistics of its input"),
        (nn.InstanceNorm2d(8, affine=True), "InstanceNorm2d normalizes by statistics"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "bilinear interpolation"),
    ],
)
def test_what_stays_float_says_why_and_what_it_costs(
    part: nn.Module, cause: str, tmp_path: Path
) -> None:
    q = compiled(lambda s, x: s.part(x), part=part.eval())
    (row,) = [row for row in q.report.coverage if row.reason]
    assert row.reason.startswith(cause)
    assert "pass through float32 and back" in row.reason
    assert q.report.int8_share == 1
    q.save(tmp_path / "m.fxq")
    loaded = fxquant.load(tmp_path / "m.fxq", target="reference")
    assert torch.equal(loaded(X), q(X))
