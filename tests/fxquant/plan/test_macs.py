from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxquant.plan.macs import multiply_accumulates
from tests.fxquant.small_networks import compiled


def small_swin() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4],
        num_classes=5,
    ).eval()  # fmt: skip


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
