"""A file's golden pair is run once on a machine: the cache remembers that it held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.artifact import golden
from fxquant.artifact.file import load_artifact
from passes import tensor_info


class TwoOutputs(nn.Module):
    """A layer whose pieces come out as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, second = self.layer(x).chunk(2, dim=1)
        return {"first": first, "second": second.relu()}


def saved(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    x = torch.randn(3, 6)
    fxquant.compile(TwoOutputs().eval(), "w8a8", calibration=x, target="reference").save(path)
    return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been run since, with a cache of its own."""
    found: list[str] = []
    run = golden.run_and_annotate

    def counted(*args: object, name: str) -> object:
        found.append(name)
        return run(*args, name=name)  # type: ignore[arg-type]

    monkeypatch.setattr(golden, "run_and_annotate", counted)
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
    return found


def infos(integer: fx.GraphModule) -> dict[str, object]:
    return {node.name: node.meta.get("tensor") for node in integer.graph.nodes}


def test_a_file_that_held_here_does_not_run_again(tmp_path: Path, runs: list[str]) -> None:
    path = saved(tmp_path / "m.fxq")
    first = load_artifact(path, remember=True)
    assert runs == ["its golden input"]
    second = load_artifact(path, remember=True)
    assert runs == ["its golden input"]
    assert infos(first.integer) == infos(second.integer)
    output = next(iter(reversed(second.integer.graph.nodes)))
    assert tensor_info(output.all_input_nodes[0]) is not None


def test_another_file_runs(tmp_path: Path, runs: list[str]) -> None:
    for seed in (0, 1):
        load_artifact(saved(tmp_path / f"{seed}.fxq", seed), remember=True)
    assert len(runs) == 2


def test_another_processor_runs_it_again(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "m.fxq")
    load_artifact(path, remember=True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    load_artifact(path, remember=True)
    assert len(runs) == 2


def test_what_is_damaged_in_the_cache_is_run_again(tmp_path: Path, runs: list[str]) -> None:
    path = saved(tmp_path / "m.fxq")
    load_artifact(path, remember=True)
    (kept,) = (tmp_path / "cache").glob("*.golden.json")
    kept.write_text(kept.read_text().replace("4", "5"))
    load_artifact(path, remember=True)
    assert len(runs) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "file" / "cache"))
    load_artifact(saved(tmp_path / "m.fxq"), remember=True)
    assert len(runs) == 1


def test_nothing_is_kept_unless_asked_for(tmp_path: Path, runs: list[str]) -> None:
    path = saved(tmp_path / "m.fxq")
    fxquant.load(path, "reference")
    fxquant.load(path, "reference")
    assert len(runs) == 2
    assert not (tmp_path / "cache").exists()
