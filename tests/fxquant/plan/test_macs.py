from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxquant.plan.macs import multiply_accumulates
from tests.fxquant.small_networks import compiled, module


def small_swin() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4],
        num_classes=5,
    ).eval()  # fmt: skip


def rows(model: nn.Module, *inputs: torch.Tensor) -> dict[str, int | None]:
    q = compiled(model.eval(), calibration=[inputs], target="reference")
    return {row.operation: row.macs for row in q.report.coverage if row.operation != "conv1d"}


class Half(nn.Module):
    """A leaf: its branch cannot be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(x) / 2


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (Half(nn.Linear(8, 8)), {"half": 4 * 8 * 8}),
        (nn.RNN(8, 6, batch_first=True), {"rnn": 4 * (8 + 6) * 6}),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            {"transformerencoderlayer": 4 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 4 * 4 * 8},
        ),
    ],
    ids=["a branch", "a recurrent layer", "an encoder layer"],
)
def test_leaves_are_counted_while_they_run(leaf: nn.Module, expected: dict[str, int]) -> None:
    x = torch.randn(2, 8, 4)

    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.leaf(self.conv(x).transpose(1, 2))
        return y[0] if isinstance(self.leaf, nn.RNN) else y

    found = rows(module(forward, conv=nn.Conv1d(8, 8, 1), leaf=leaf), x)
    assert {name: found[name] for name in expected} == expected


def test_what_cannot_be_counted_is_unknown() -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return F.bilinear(self.conv(x).mean(2), x.mean(2), self.weight)

    model = module(forward, conv=nn.Conv1d(8, 8, 1), weight=torch.randn(3, 8, 8))
    q = compiled(model, calibration=torch.randn(2, 8, 4), target="reference")
    assert {row.operation: row.macs for row in q.report.coverage}["bilinear"] is None
    assert "of unknown size: 1 x bilinear" in str(q.report)


@pytest.mark.parametrize(
    ("network", "side"),
    [(torchvision.models.mobilenet_v2, 32), (small_swin, 16)],
    ids=["convolutions", "attention in windows"],
)
def test_as_many_as_torch_counts(network: type[nn.Module], side: int) -> None:
    model, image = network().eval(), torch.randn(1, 3, side, side)
    fused = compiled(model, calibration=image, target="reference").stages["fused"]

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)

    found = sum(multiply_accumulates(node, fused) for node in fused.graph.nodes)
    assert found == counter.get_total_flops() // 2
