import json

import pytest
import torch

from fxquant.cli import main, measuring
from fxquant.cli.quickstart.data import CLASSES, draw
from fxquant.cli.quickstart.network import WEIGHTS, trained
from fxquant.cli.quickstart.run import Quickstart, quickstart, shorten
from fxquant.measure.evaluate import evaluate


def test_images_are_drawn_from_the_seed() -> None:
    images, labels = draw(20, seed=1)
    again, _ = draw(20, seed=1)
    other, _ = draw(20, seed=2)
    assert images.shape == (20, 3, 32, 32)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert labels.bincount().tolist() == [2] * len(CLASSES)


def test_weights_are_small_and_trained() -> None:
    assert WEIGHTS.stat().st_size <= 300_000
    top1 = evaluate(trained(), [draw(500, seed=3_000_000)]).top1
    assert top1 is not None
    assert 0.9 < top1 < 0.99


def test_shortens_a_diff_to_its_changes() -> None:
    diff = "--- before\n+++ after\n@@ -1 +1 @@\n same\n-a\n-b\n+c"
    assert list(shorten(diff)) == ["-a", "-b", "+c"]
    assert list(shorten(diff, 2)) == ["-a", "-b", "  ... and 1 more changed lines"]


@pytest.fixture(scope="module")
def result() -> Quickstart:
    with torch.random.fork_rng(devices=[]):
        return quickstart()


def test_quickstart_quantizes_without_losing_accuracy(result: Quickstart) -> None:
    assert result.evaluation.top1_drop is not None
    assert result.evaluation.top1_drop < 0.01
    assert result.evaluation.agreement is not None
    assert result.evaluation.agreement > 0.97
    assert result.compiled.report.int8_share > 0.99


def test_quickstart_prints_diffs_coverage_accuracy_size_and_latency(
    result: Quickstart, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "quickstart", lambda progress: result)
    assert main(["quickstart"]) == 0
    printed = capsys.readouterr().out
    for words in ("nodes created", "more changed lines", "int8", "agreement", "size:", "median"):
        assert words in printed
    assert main(["quickstart", "--diff"]) == 0
    assert "more changed lines" not in capsys.readouterr().out


def test_quickstart_prints_json(
    result: Quickstart, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "quickstart", lambda progress: result)
    assert main(["quickstart", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"report", "evaluation", "benchmark", "seconds"} == set(data)
