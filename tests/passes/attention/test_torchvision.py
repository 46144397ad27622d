from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models import swin_transformer
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from fxquant.frontend.trace import trace
from passes import (
    Canonicalize,
    DecomposeAttention,
    EliminateNoops,
    FoldConstants,
    Pass,
    SplitSharedModules,
)
from passes.infra import listing
from passes.infra.pipeline import PassRecord, Pipeline

GONE = {
    "multiheadattention",
    "shifted_window_attention",
    "_get_relative_position_bias",
    "_patch_merging_pad",
    "einsum",
}


def decompose(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[PassRecord]]:
    """The graph of `model`, checked to mean the same for this and another batch size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Every weight takes part: many are made as zeros.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    graph_module = trace(model.eval()).graph_module
    steps: list[Pass] = [Canonicalize(), SplitSharedModules(), EliminateNoops()]
    steps += [FoldConstants(), DecomposeAttention()]
    records = Pipeline(steps).run(graph_module, (x,))
    operations = listing.count_operations(graph_module)
    assert not GONE & set(operations), operations
    for batch in (x, torch.cat([x, x.flip(0), x])):
        with torch.no_grad():
            expected, found = model(batch), graph_module(batch)
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(step.run(graph_module).modified for step in steps)
    return graph_module, records


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_vision_transformer() -> None:
    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    graph_module, records = decompose(model, image(16))
    operations = listing.count_operations(graph_module)
    assert operations["scaled_matmul"] == operations["matmul"] == operations["softmax"] == 2
    assert operations["linear"] == 2 * (4 + 2) + 1
    assert records[-1].declines == ()
    path = "encoder.layers.encoder_layer_1.self_attention"
    assert {str(node.target) for node in graph_module.graph.nodes} >= {
        f"{path}.{name}_proj" for name in ("q", "k", "v", "out")
    }


def swin(version: int, **options: Any) -> nn.Module:
    names = ("SwinTransformerBlock", "PatchMerging")
    block, merging = (getattr(swin_transformer, f"{name}{'V2' * (version - 1)}") for name in names)
    given = {"depths": [2], "num_heads": [2], "window_size": [4, 4], **options}
    return SwinTransformer([2, 2], 8, num_classes=5, block=block, downsample_layer=merging, **given)


@pytest.mark.parametrize("size", [16, 18], ids=["whole windows", "padded"])
@pytest.mark.parametrize("version", [1, 2])
def test_swin_transformer(version: int, size: int) -> None:
    graph_module, records = decompose(swin(version), image(size))
    operations = listing.count_operations(graph_module)
    assert operations["softmax"] == operations["masked_softmax"] == 1
    assert operations.get("roll") == 2
    assert operations.get("normalize", 0) == 4 * (version - 1)
    assert operations.get("scaled_matmul", 0) == 2 * (2 - version)
    assert operations.get("pad", 0) == 2 * (size == 18)
    assert records[-1].declines == ()
    paths = {str(node.target) for node in graph_module.graph.nodes}
    assert {f"features.1.1.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")} <= paths
    assert not [name for name, _ in graph_module.named_parameters() if "qkv" in name]


@pytest.mark.parametrize("version", [1, 2])
def test_swin_transformer_merges_patches(version: int) -> None:
    graph_module, _ = decompose(swin(version, depths=[1, 2], num_heads=[1, 2]), image(14))
    # 7 x 7 is padded to 8 x 8 for the windows and again for the merging, which leaves 4 x 4:
    # a single window, which is not shifted.
    operations = listing.count_operations(graph_module)
    assert "masked_softmax" not in operations
    assert operations["cat"] == 1


def test_swin_windows_that_are_shifted_along_one_axis() -> None:
    model = swin(1, window_size=[4, 8])
    graph_module, _ = decompose(model, image(16))
    assert listing.count_operations(graph_module)["masked_softmax"] == 1


def test_swin_without_biases() -> None:
    for version in (1, 2):
        model = swin(version)
        for block in model.modules():
            if isinstance(block, swin_transformer.ShiftedWindowAttention):
                block.qkv.bias = block.proj.bias = None
        decompose(model, image(16))


def test_max_vit() -> None:
    model = MaxVit((32, 32), 8, 4, [8], [1], 4, 0.0, num_classes=5)
    graph_module, records = decompose(model, image(32))
    operations = listing.count_operations(graph_module)
    assert operations["scaled_matmul"] == operations["matmul"] == operations["softmax"] == 2
    assert operations["conv2d"] > 0
    assert records[-1].declines == ()
