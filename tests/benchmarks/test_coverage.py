"""The benchmark of coverage: its networks, its processes, its rows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import coverage, networks_covered

ROW: dict[str, Any] = {
    "network": "timm:resnet10t",
    "recipe": "w8a8",
    "front_end": "torch.fx",
    "int8": 0.9987,
    "sqnr_db": 31.26,
    "saved": "equal",
}
LIMITS = {"seconds": 60, "memory": 100}


def test_every_network_of_torchvision_and_sixty_families_of_timm_are_in_it() -> None:
    kinds = list(networks_covered.NETWORKS.values())
    assert kinds.count("classification") == 80
    assert {"segmentation", "video", "flow", "detection"} < set(kinds)
    assert kinds.count("timm") == len(set(networks_covered.TIMM)) >= 60


def test_batch_norms_have_the_statistics_of_a_batch() -> None:
    model = networks_covered.of("torchvision:resnet18").warmed()
    norm: Any = model.get_submodule("bn1")
    assert not norm.training
    assert bool(norm.running_mean.any())
    assert not bool((norm.running_var == 1).any())


def test_a_process_that_ends_or_computes_too_long_is_a_row() -> None:
    def spin() -> None:
        while time.process_time() < 60:
            pass

    assert coverage.in_own_process(lambda: {"a": 1}, **LIMITS) == {"a": 1}
    assert "its process ended" in coverage.in_own_process(lambda: os._exit(1), **LIMITS)
    assert "ValueError: no" in coverage.in_own_process(_raises, **LIMITS)
    used = int(time.process_time()) + 1
    assert "of CPU time" in coverage.in_own_process(spin, seconds=used, memory=100)


def test_no_row_names_a_folder_of_this_machine() -> None:
    where = "/v/lib/site-packages/timm/a.py:3"
    text = f"cannot save /tmp/x1/m.fxq: at {where}; how to run it again is in /tmp/y"
    assert coverage._anywhere(text) == "cannot save m.fxq: at timm/a.py:3"


def _raises() -> None:
    raise ValueError("no")


def test_a_network_has_a_row_whose_file_is_equal(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    row = coverage.row_of("torchvision:squeezenet1_1", save=True, seconds=600, memory=100)
    assert (row["front_end"], row["int8"], row["saved"]) == ("torch.fx", 1.0, "equal")
    assert row["sqnr_db"] > 10


def test_the_table_counts_and_has_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"network": "timm:x", "recipe": "w8a8", "error": "TraceError: /a/b/c.py:3 branches"}
    rows = {row["network"]: row for row in (ROW, failed)}
    monkeypatch.setattr(coverage, "rows_of_file", lambda: rows)
    lines = coverage.table().splitlines()
    assert "networks are measured: 1 compile, 1 of these with at least 99 %" in lines[0]
    assert "99.9 %" in lines[4]
    assert "c.py:3 branches" in lines[5]
    assert "/a/b" not in lines[5]
