"""``target="auto"``: the fastest of this machine's targets, and what the report says of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

import fxquant
from fxquant.backends import Execution, candidates, choice
from fxquant.backends.reference.target import Reference
from fxquant.backends.targets import TARGETS
from fxquant.errors import CompileError, TargetError
from tests.fxquant.small_networks import conv_net, images


class Stub(Reference):
    """The reference, under another name and with a delay."""

    def __init__(
        self, name: str, *, seconds: float = 0.0, reason: str = "", fails: str = ""
    ) -> None:
        self.stub, self.seconds, self.reason, self.fails = name, seconds, reason, fails

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.stub

    def unavailable(self) -> str:
        return self.reason

    def execution(self, lowered: fx.GraphModule, example: Sequence[Any]) -> Execution:
        if self.fails:
            raise CompileError(self.fails)

        def run(*inputs: Any) -> Any:
            time.sleep(self.seconds)
            return lowered(*inputs)

        return Execution(run)


def compiled(monkeypatch: pytest.MonkeyPatch, first: Stub, second: Stub) -> fxquant.CompiledModel:
    for stub in (first, second):
        monkeypatch.setitem(TARGETS, stub.name, stub)
    monkeypatch.setattr(choice, "_FAST", (first.name, second.name))
    return fxquant.compile(conv_net(), "w8a8", calibration=images(), target="auto")


def test_the_fastest_is_taken_and_the_report_says_by_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = compiled(monkeypatch, Stub("slow", seconds=0.05), Stub("quick"))
    assert q.target == "quick"
    (note,) = [note for note in q.report.target_notes if note.startswith("auto")]
    assert note.startswith("auto: quick runs, in 0.")
    assert "of slow's time here (inputs [" in note
    assert torch.equal(q(images()), q.to_target("reference")(images()))


def test_what_is_slower_than_float_stands_in_the_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    q = compiled(monkeypatch, Stub("one", seconds=0.05), Stub("other", seconds=0.06))
    assert str(q.report).startswith("SLOWER THAN FLOAT here: ")
    assert str(replace(q.report, time_over_float=0.25)).startswith("4.0 x faster than float")


def test_one_that_is_missing_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    q = compiled(monkeypatch, Stub("away", reason="no compiler"), Stub("here"))
    assert q.target == "here"
    assert "auto: not away: no compiler" in q.report.target_notes


def test_one_that_fails_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    q = compiled(monkeypatch, Stub("broken", fails="the linker is gone"), Stub("whole"))
    assert q.target == "whole"
    assert "auto: not broken: the linker is gone" in q.report.target_notes


def test_none_at_all_is_an_error_that_names_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "away", Stub("away", reason="no compiler"))
    monkeypatch.setattr(choice, "_FAST", ("away",))
    with pytest.raises(TargetError, match=r"away: no compiler.*reference"):
        candidates("auto")
