"""A target is one package and one line: everything else asks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxquant
from fxquant.backends import Execution, LoweredGraph, Target, TargetCheck, check_operations
from fxquant.backends import targets as table
from fxquant.cli.app import main
from fxquant.errors import CompileError, TargetError
from passes import copy_sharing_tensors
from tests.fxquant.small_networks import Residual, compiled, images


class Counting:
    """A target of a few lines: the reference, its calls counted."""

    name = "counting"
    tolerance = 0
    passes = ()

    def __init__(self, reason: str = "", wrong_by: float = 0.0) -> None:
        self.reason = reason
        self.wrong_by = wrong_by
        self.calls = 0

    def unavailable(self) -> str:
        return self.reason

    def weight_refusal(self) -> Any:
        return lambda codes: "it counts to 63" if codes.abs().max() > 63 else ""

    def lower(
        self, integer: fx.GraphModule, example: Sequence[Any], keep: frozenset[str]
    ) -> LoweredGraph:
        lowered = copy_sharing_tensors(integer)
        for node in lowered.graph.nodes:
            node.meta["integer"] = node.name
        (end,) = (node for node in lowered.graph.nodes if node.op == "output")
        with lowered.graph.inserting_before(end):
            moved = lowered.graph.call_function(torch.add, (end.args[0], self.wrong_by))
        end.args = (moved if self.wrong_by else end.args[0],)
        lowered.recompile()
        return LoweredGraph(lowered, notes=("it can count",))

    def check(
        self, integer: fx.GraphModule, lowered: fx.GraphModule, example: Sequence[Any]
    ) -> TargetCheck:
        return check_operations(integer, lowered, example)

    def execution(self, lowered: fx.GraphModule, example: Sequence[Any]) -> Execution:
        def run(*inputs: Tensor) -> Any:
            self.calls += 1
            return lowered(*inputs)

        return Execution(run, ("it has counted nothing yet",))


def add(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.TARGETS, target.name, target)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    target = Counting()
    add(target, monkeypatch)
    return target


def test_a_new_target_compiles_and_runs(counting: Counting) -> None:
    q = compiled(Residual(), target="counting")
    found = q(images())
    assert counting.calls == 1
    assert torch.equal(found, q.stages["integer"](images()))
    assert list(q.stages)[-1] == "counting"


def test_its_notes_its_check_and_its_name_are_in_the_report(counting: Counting) -> None:
    report = compiled(Residual(), target="counting").report
    assert report.target_notes == ("it can count", "it has counted nothing yet")
    assert report.target_check["values"] > 0
    assert "counting against reference, operation by operation" in str(report)


def test_weights_that_it_refuses_lose_a_bit(counting: Counting) -> None:
    q = compiled(Residual(), target="counting")
    weights = [t for name, t in q.stages["integer"].named_buffers() if name.endswith("weight")]
    assert max(int(weight.abs().max()) for weight in weights) == 63
    assert any("7 bits, because it counts to 63" in note for note in q.report.notes)


def test_files_and_other_targets_come_to_it(counting: Counting, tmp_path: Path) -> None:
    q = compiled(Residual(), target="reference")
    q.save(tmp_path / "m.fxq")
    loaded = fxquant.load(tmp_path / "m.fxq", target="counting")
    for model in (loaded, q.to_target("counting"), loaded.to_target("counting")):
        assert torch.equal(model(images()), q(images()))
        assert model.report.target == "counting"
    assert counting.calls == 3


def test_what_measures_runs_it(counting: Counting) -> None:
    q = compiled(Residual(), target="counting")
    labels = torch.arange(4) % 2
    assert fxquant.evaluate(q, [(images(), labels)]).top1 is not None
    assert counting.calls == 1
    assert any(row.what == "activation" for row in fxquant.compare(q, images()).rows)


def test_finetuning_comes_back_to_it(counting: Counting) -> None:
    q = compiled(Residual(), target="counting")
    labels = torch.arange(4) % 2
    trained = fxquant.finetune(q, [(images(), labels)], epochs=1, learning_rate=1e-3)
    assert trained.target == "counting"
    assert any("7 bits" in note for note in trained.report.notes)


def test_it_is_listed_and_named_in_errors(
    counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    available = fxquant.available_targets()
    assert list(available) == ["x86", "native", "reference", "counting"]
    assert available["counting"] == available["reference"] == ""
    with pytest.raises(
        TargetError, match="known are x86, native, reference, counting, auto; did you mean 'cou"
    ):
        compiled(target="count")
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    assert "x86, native, reference, counting, or auto, the fastest here; default x86" in " ".join(
        capsys.readouterr().out.split()
    )


def test_one_that_is_not_available_says_why_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(Counting("it has no fingers"), monkeypatch)
    assert fxquant.available_targets()["counting"] == "it has no fingers"
    with pytest.raises(TargetError, match="no fingers; available: x86, "):
        fxquant.compile(Residual(), "w8a8", calibration="no data at all", target="counting")
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    assert "counting (it has no fingers)" in " ".join(capsys.readouterr().out.split())


def test_an_exact_target_must_give_the_outputs_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(Counting(wrong_by=1e-3), monkeypatch)
    with pytest.raises(CompileError, match="other outputs than the integer graph"):
        compiled(Residual(), target="counting")


def test_unknown_targets_are_named() -> None:
    with pytest.raises(TargetError, match="did you mean 'x86'"):
        table.find_target("x68")
