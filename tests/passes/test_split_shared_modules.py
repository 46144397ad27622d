from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.split_shared_modules import SplitSharedModules
from tests.passes.checking import check


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_gives_every_call_its_own_module() -> None:
    check(
        SplitSharedModules(),
        Twice(nn.Conv2d(3, 3, 1)),
        torch.randn(1, 3, 4, 4),
        expect="""
            x         = input               f32[1,3,4,4]
            block_0   = conv2d(x)           f32[1,3,4,4]
            block_1   = conv2d(block_0)     f32[1,3,4,4]
            return block_1""",
        modified=True,
    )


def test_copies_share_their_tensors_and_have_numbered_paths() -> None:
    found = check(SplitSharedModules(), Twice(nn.Conv2d(3, 3, 1)), torch.randn(1, 3, 4, 4))
    first, second = found.nodes("conv2d")
    assert (first.target, second.target) == ("block.0", "block.0_1")
    assert second.meta["module_path"] == "block.0_1"
    modules = dict(found.graph_module.named_modules())
    assert modules["block.0"] is not modules["block.0_1"]
    assert modules["block.0"].weight is modules["block.0_1"].weight


def test_leaves_out_paths_that_are_taken() -> None:
    model = Twice(nn.Conv2d(3, 3, 1))
    model.block.add_module("0_1", nn.Conv2d(3, 3, 1))
    found = check(SplitSharedModules(), model, torch.randn(1, 3, 4, 4))
    targets = [node.target for node in found.nodes("conv2d")]
    assert targets == ["block.0", "block.0_1", "block.0_2", "block.0_1_1"]


def test_splits_batch_norms_without_weights() -> None:
    model = Twice(nn.BatchNorm2d(3, affine=False))
    check(SplitSharedModules(), model, torch.randn(1, 3, 4, 4), modified=True)


def test_keeps_modules_without_tensors() -> None:
    check(SplitSharedModules(), Twice(nn.ReLU()), torch.randn(1, 3), modified=False)
