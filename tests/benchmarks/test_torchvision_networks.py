"""The networks that the benchmark of torchvision takes, and the table that it renders."""

from __future__ import annotations

from benchmarks.names import TORCHVISION
from benchmarks.torchvision_networks import chosen, coverage_table, recipe_of


def test_families_choose_networks_by_their_names() -> None:
    assert chosen([], [], False) == TORCHVISION
    assert set(chosen([], ["swin"], False)) == {
        f"swin_{version}{size}" for version in ("", "v2_") for size in "tsb"
    }
    transformers = chosen(["resnet18"], [], True)
    assert transformers[0] == "resnet18"
    assert {"vit_h_14", "swin_v2_t", "convnext_tiny", "maxvit_t"} < set(transformers)
    assert len(transformers) == 17


def test_transformers_take_their_recipe() -> None:
    assert [recipe_of(name) for name in ("maxvit_t", "resnet18")] == ["vit_w8a8", "w8a8"]


def test_the_table_is_markdown_with_a_row_for_each_network() -> None:
    row = {
        "network": "vit_b_16",
        "recipe": "vit_w8a8",
        "int8": 0.9987,
        "sqnr_db": 31.26,
        "x86_largest_difference": 1,
    }
    lines = coverage_table([row, {"network": "vit_h_14", "error": ["no memory"]}]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "`vit_b_16`",
        "`vit_w8a8`",
        "99.9 %",
        "1",
        "31.3 dB",
    ]
    assert "no memory" in lines[3]
