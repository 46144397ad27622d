"""A network that was planned before is found in the cache, and is not planned again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.backends.native import executor, target
from fxquant.backends.native.build import cache_folder
from fxquant.compiled import CompiledModel

pytestmark = pytest.mark.usefixtures("native")


def saved(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    x = torch.randn(2, 3, 5, 5)
    q = fxquant.compile(model.eval(), "w8a8", calibration=x, target="native")
    q.save(path)
    # What a file is loaded with is its golden input, which is not the example.
    fxquant.load(path, target="native")
    return path


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was planned or compared since."""
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(executor, "plan_program", counted("plan", executor.plan_program))
    monkeypatch.setattr(target, "check_operations", counted("compare", target.check_operations))
    return calls


def assert_right(q: CompiledModel, size: int = 5) -> None:
    x = torch.randn(3, 3, size, size)
    assert torch.equal(q.to_target("reference")(x), q(x))


def test_an_unchanged_network_is_neither_planned_nor_compared(
    tmp_path: Path, unplanned: list[str]
) -> None:
    path = saved(tmp_path / "m.fxq")
    unplanned.clear()
    q = fxquant.load(path, target="native")
    assert unplanned == []
    assert_right(q)
    assert q.report.target_check == fxquant.load(path, target="native").report.target_check
    # Its steps are planned again where somebody asks for them.
    (segment,) = q.stages["native"].native_0.segments
    assert {step.kernel for step in segment.plan.steps} == set(segment.planned.kernels)
    assert unplanned == ["plan"]


def test_other_weights_are_another_network(tmp_path: Path, unplanned: list[str]) -> None:
    saved(tmp_path / "m.fxq")
    unplanned.clear()
    assert_right(fxquant.load(saved(tmp_path / "n.fxq", seed=1), target="native"))
    assert unplanned[:2] == ["plan", "compare"]


def test_another_image_size_is_found_by_the_next_process(
    tmp_path: Path, unplanned: list[str]
) -> None:
    path = saved(tmp_path / "m.fxq")
    assert_right(fxquant.load(path, target="native"), size=9)
    unplanned.clear()
    assert_right(fxquant.load(path, target="native"), size=9)
    assert unplanned == []


def test_what_is_damaged_in_the_cache_is_made_again(tmp_path: Path, unplanned: list[str]) -> None:
    path = saved(tmp_path / "m.fxq", seed=2)
    newest = sorted(cache_folder().iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for file in (file for file in newest[-8:] if file.suffix in (".json", ".bin")):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    unplanned.clear()
    assert_right(fxquant.load(path, target="native"))
    assert unplanned[:2] == ["plan", "compare"]
