"""Diffs of a real network are short: equal edits are one line."""

import re

import pytest
import torch
from torch import nn

import fxquant
from fxquant.report.diffs import summarize_diff
from tests.fxquant.small_networks import images


@pytest.fixture(scope="module")
def edits() -> dict[str, str]:
    """What each pass did to three blocks of convolution, batch norm and ReLU."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(12, 2)).eval()
    q = fxquant.compile(model, "w8a8", calibration=images(), target="reference")
    return {r.name: summarize_diff(r, color=False) for r in q.report.passes}


def test_equal_edits_are_one_line(edits: dict[str, str]) -> None:
    title, *lines = edits["fold_batch_norm"].splitlines()
    assert "batchnorm2d 3 -> 0" in title
    assert lines == ["- 3 x batchnorm2d(·)   (_0_1, _1_1, _2_1)"]


def test_arguments_that_are_spelled_out_are_no_edits(edits: dict[str, str]) -> None:
    assert edits["canonicalize"].splitlines()[1:] == ["  4 x only arguments spelled out"]


def test_quantizers_are_what_was_inserted_and_not_the_graph_around(edits: dict[str, str]) -> None:
    lines = edits["insert_quant_dequant"].splitlines()[1:]
    assert "+ 4 x quantize(·) u8 affine   (x_q, _0_0_q, _1_0_q and 1 more)" in [
        re.sub(r"input_?\w*_q", "x_q", line) for line in lines
    ]
    assert any(
        line.startswith("+ 3 x conv2d_relu gets s8 [-127, 127] per channel") for line in lines
    )
    assert len(lines) == 3


def test_a_layer_that_becomes_another_says_both(edits: dict[str, str]) -> None:
    assert "! 3 x conv2d(·) -> conv2d_relu(·)" in edits["fuse_conv_bn_relu"]


def test_numbers_of_layers_do_not_tell_edits_apart(edits: dict[str, str]) -> None:
    assert "~ 4 x bias moved by # to #" in edits["correct_bias"]
