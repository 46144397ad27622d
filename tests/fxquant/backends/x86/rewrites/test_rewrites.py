"""The rewrites for x86 are passes like all others: verified, recorded, shown."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.backends.x86.rewrites import PadChannels
from fxquant.compiled import CompiledModel
from fxquant.errors import CompileError
from fxquant.report.diffs import summarize_diff
from passes import PassResult
from tests.fxquant.small_networks import compiled

NAMES = ["merge_branches", "fold_channel_shuffle", "pad_channels"]


class Shuffled(nn.Module):
    """A stem, a pool and a unit of ShuffleNetV2, whose branches merge into one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Conv2d(4, 4, 1), nn.ReLU(),
        )  # fmt: skip
        self.end = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        return self.end(nn.functional.channel_shuffle(torch.cat([left, self.branch(right)], 1), 2))


def shuffled(**options: object) -> CompiledModel:
    torch.manual_seed(0)
    return compiled(Shuffled().eval(), **options)


def test_every_rewrite_is_in_the_diff_and_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    q = shuffled(verbose=True)
    records = q.report.target_passes
    printed, report = capsys.readouterr().out, str(q.report)
    assert [record.name for record in records] == NAMES
    changed = [record for record in records if record.modified]
    assert {"merge_branches", "pad_channels"} <= {record.name for record in changed}
    for record in changed:
        assert f"== {record.name}: " in printed
        assert summarize_diff(record, color=False) in printed
        assert f"\n{record.name} " in report


def test_of_a_lowering_to_another_target_its_own_rewrites_are_reported() -> None:
    q = shuffled()
    reference = q.to_target("reference")
    assert reference.report.target_passes == ()
    assert [record.name for record in reference.to_target("x86").report.target_passes] == NAMES


def test_a_rewrite_that_changes_the_outputs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: PadChannels, graph_module: fx.GraphModule) -> PassResult:
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.fxquant.quantize.default:
                node.args = (node.args[0], 2 * node.args[1], *node.args[2:])
        graph_module.recompile()
        return PassResult(True)

    monkeypatch.setattr(PadChannels, "run", wrong)
    with pytest.raises(CompileError, match="pad_channels: is exact but output differs"):
        shuffled()
