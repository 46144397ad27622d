"""What the report says of a compile, printed and as data."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.plan.macs import multiply_accumulates
from fxquant.report.diffs import colored
from fxquant.report.report import Report
from tests.fxquant.small_networks import Residual, compiled, conv_net, module


def test_json_comes_back_the_same() -> None:
    data = compiled().report.to_json()
    again = Report.from_json(json.loads(json.dumps(data, allow_nan=False)))
    assert {**again.to_json(), "passes": data["passes"]} == data
    assert again.int8_share == data["int8_share"] == 1.0


def test_json_is_the_same_each_time() -> None:
    model = Residual()
    assert compiled(model).report.to_json() == compiled(model).report.to_json()


def test_proofs_are_printed() -> None:
    report = compiled().report
    proven = {row.path: row.proof for row in report.quantizers if row.proof}
    assert "relu" in proven["quantizers.conv1"]
    assert f"of which {len(proven)} one-sided" in str(report)
    assert next(iter(proven.values())) in str(report)


def test_values_that_may_be_negative_have_no_proof() -> None:
    rows = {row.path: row for row in compiled().report.quantizers}
    assert rows["quantizers.x"].proof == ""
    assert "zero point" in rows["quantizers.x"].grid


def test_float_operations_are_printed_with_their_reason() -> None:
    model = module(lambda self, x: torch.sin(self.conv(x)), conv=nn.Conv2d(3, 4, 1))
    printed = str(compiled(model).report)
    assert "sin has no integer form" in printed
    assert "share of MACs" in printed


def test_says_so_where_all_is_on_integers() -> None:
    assert "every operation runs on integers" in str(compiled(conv_net()).report)


def test_declines_are_printed_with_their_place() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y

    report = compiled(module(forward, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))).report
    assert any(row.by == "fold_batch_norm" and row.reason for row in report.declines)
    assert "declined:" in str(report)


def test_what_the_passes_of_a_target_decline_is_printed() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.add(self.last(F.channel_shuffle(y, 2)), y)

    model = module(forward, first=nn.Conv2d(3, 4, 1), last=nn.Conv2d(4, 4, 3, padding=1, groups=4))
    report = compiled(model).report
    assert {row.by for row in report.target_declines} == {"fold_channel_shuffle"}
    assert "is no convolution of all channels" in str(report)
    assert Report.from_json(report.to_json()).target_declines == report.target_declines


def test_passes_that_changed_nothing_share_a_line() -> None:
    printed = str(compiled().report)
    (line,) = (line for line in printed.splitlines() if line.startswith("without a change: "))
    assert "defer_softmax_division" in line
    rows = [line.split()[0] for line in printed.splitlines() if line]
    assert "fuse_conv_bn_relu" in rows
    assert "defer_softmax_division" not in rows


def test_the_check_of_the_target_is_printed() -> None:
    report = compiled().report
    assert report.target_check["largest_difference"] <= 1
    assert report.target_check["values"] > 0
    assert "x86 against reference" in str(report)
    assert compiled(target="reference").report.target_check == {}


def test_sizes_shrink() -> None:
    report = compiled(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 256, 3)).eval()).report
    assert 3 < report.float_size_bytes / report.size_bytes < 4


def test_passes_are_recorded() -> None:
    names = [record.name for record in compiled().report.passes]
    assert names[:3] == ["canonicalize", "split_shared_modules", "eliminate_noops"]
    assert names.index("fold_batch_norm") < names.index("infer_ranges")
    assert "assign_one_sided" in names


def test_multiply_accumulates_are_of_one_image() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(8, 2, 2, stride=2), nn.Flatten(), nn.Linear(128, 5),
    ).eval()  # fmt: skip
    rows = [row.macs for row in compiled(model).report.coverage if row.macs]
    assert rows == [64 * 4 * 27, 16 * 8 * 18, 16 * 8 * 2 * 4, 128 * 5]


def test_reasons_are_grouped_by_their_root() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.softsign(self.conv(x))
        return self.last(torch.cat([y.relu().abs(), y.abs().relu()], 1))

    q = compiled(module(forward, conv=nn.Conv2d(3, 4, 1), last=nn.Conv2d(8, 4, 1)))
    assert "softsign has no integer form" in str(q.report)
    assert "it reads what softsign computes in float" in str(q.report)
    assert "its operand relu" not in str(q.report)


def test_a_compiled_model_shows_what_it_is() -> None:
    assert re.fullmatch(
        r"CompiledModel\(Residual, recipe w8a8, target x86, int8 100.00%, 17\.\d kB\)",
        repr(compiled()),
    )


def test_a_small_network_is_not_of_zero_million() -> None:
    head = str(compiled(nn.Linear(8, 4).eval()).report)
    assert "100.00% of 768 multiply-accumulates" in head


def test_products_of_values_count_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2)
        return torch.matmul(y, y.transpose(1, 2))

    q = compiled(module(forward, conv=nn.Conv2d(3, 4, 1)))
    fused = q.stages["fused"]
    counts = {n.name: multiply_accumulates(n, fused) for n in fused.graph.nodes}
    assert counts["matmul"] == 4 * 64 * 4


def test_diffs_are_colored_by_their_first_letter() -> None:
    assert colored(["+a", "-b", " c"], color=True) == [
        "\x1b[32m+a\x1b[0m",
        "\x1b[31m-b\x1b[0m",
        " c",
    ]
    assert colored(["+a"], color=False) == ["+a"]
