"""Pages of what was measured: what they show is what was found."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

import fxquant
from fxquant.data import ImageBatches, open_batches
from fxquant.errors import InputError
from fxquant.measure.benchmark import Machine
from fxquant.measure.evaluate import Change, Evaluation, evaluate
from fxquant.measure.node_times import node_times
from fxquant.measure.pages import (
    accuracy_section,
    comparison_section,
    latency_section,
    times_table,
    write_sensitivity,
    write_sweep,
)
from fxquant.measure.sweep import Sweep
from fxquant.measure.sweep_rows import SweepRow
from tests.fxquant.report.test_html import Page
from tests.fxquant.small_networks import Residual, compiled, images


@pytest.fixture
def batches(tmp_path: Path) -> ImageBatches:
    random = numpy.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 8, 8, 3), dtype=numpy.uint8)
    numpy.savez(tmp_path / "some.npz", images=pixels, labels=numpy.array([0, 1, 2, 3, 0, 1]))
    return open_batches(tmp_path / "some.npz", preprocessing="none", batch_size=4)


def test_changed_predictions_are_found_with_their_images() -> None:
    inputs = torch.eye(4).unsqueeze(0).repeat(3, 1, 1)[:, 0]  # class 0 each
    found = evaluate(
        lambda x: x.roll(1, 1) if len(x) == 1 else x,
        [(inputs[:2], torch.tensor([0, 1])), (inputs[2:], torch.tensor([1]))],
        reference=lambda x: x,
    )
    assert found.changed == (Change(image=2, reference=0, found=1, label=1),)


def test_changed_images_are_shown(batches: ImageBatches) -> None:
    float_model = Evaluation(6, 0.5, 1.0, 1.0)
    changed = (Change(0, 0, 1, 0), Change(5, 2, 1, 1), Change(3, 1, 2, 3))
    found = Evaluation(6, 0.5, 1.0, 1.0, 0.5, 20.0, float_model, changed=changed)
    body = accuracy_section(found, batches).body
    assert "3 predictions changed: 1 were right in float, 1 are right now, 1 neither" in body
    assert body.count("data:image/jpeg;base64,") == 3
    assert "some.npz[5]" in body
    assert accuracy_section(found, batches, most=2).body.count("<img") == 2


def test_nothing_changed_is_said() -> None:
    same = Evaluation(6, None, None, None, 1.0, 20.0, Evaluation(6, None, None, None))
    assert "No prediction changed" in accuracy_section(same).body


@pytest.mark.parametrize("target", ["x86", "reference"])
def test_every_operation_has_a_time(target: str) -> None:
    q = compiled(target=target)
    times = node_times(q, images(1), calls=2)
    assert {row.node for row in q.report.coverage} <= set(times) | {"mean"}
    assert all(spent > 0 for spent in times.values())


def test_native_layers_have_the_names_of_the_fused_graph(native: None) -> None:
    times = node_times(compiled(target="native"), images(1), calls=2)
    assert {"stem", "conv1", "conv2", "head"} <= set(times)


def test_times_need_a_call() -> None:
    with pytest.raises(InputError, match="at least 1"):
        node_times(compiled(), images(1), calls=0)


def test_operations_lead_to_their_details_and_what_is_none_does_not() -> None:
    body = times_table({"conv": 1.0, "x_q": 3.0}, {"conv"})
    assert 'href="#layer-conv"' in body
    assert "#layer-x_q" not in body
    assert body.index("x_q") < body.index("conv")
    assert "75.00%" in body


def test_latency_names_the_target_and_the_machine() -> None:
    body = latency_section(compiled()).body
    assert "target x86" in body
    assert Machine.here().cpu in body


def test_a_comparison_has_a_row_each() -> None:
    found = fxquant.compare(compiled(), images())
    assert comparison_section(found).body.count("<tr>") == len(found.rows) + 1


def test_a_sensitivity_page_has_a_chart_a_measure_and_a_dot_an_effect(tmp_path: Path) -> None:
    found = fxquant.sensitivity(Residual(), "w4a8", images(), bits=(4, 8), activations=True)
    write_sensitivity(found, tmp_path / "s.html", "Residual")
    text = (tmp_path / "s.html").read_text()
    assert not Page(text).open
    finite = sum(row.sqnr_db < float("inf") for row in found.rows)
    finite += sum(bool(row.kl) for row in found.rows)
    assert text.count('class="dot') == finite
    assert "SQNR of the output, dB" in text
    assert "KL from float, nats" in text


def test_a_sweep_page_draws_accuracy_against_bits_size_and_latency(tmp_path: Path) -> None:
    def row(name: str, bits: int, top1: float, size: int, latency: float) -> SweepRow:
        reached = Evaluation(10, top1, 1.0, 1.0, 1.0, 20.0, Evaluation(10, 0.8, 1.0, 1.0))
        return SweepRow(name, {"weights.bits": bits}, 5, reached, size, latency)

    rows = (
        SweepRow("float", {}, 0, Evaluation(10, 0.8, 1.0, 1.0), 4000, 3.0),
        row("W8", 8, 0.79, 1000, 1.0),
        row("W4", 4, 0.7, 500, 1.1),
        SweepRow("W2", {"weights.bits": 2}, 5, None, None, None, "no such <bits>"),
    )
    found = Sweep("some", "w8a8", "x86", rows, Machine.here())
    write_sweep(found, tmp_path / "s.html", "Residual")
    text = (tmp_path / "s.html").read_text()
    assert not Page(text).open
    for name in ("bits of weights", "size of the weights, MB", "latency of an image, ms"):
        assert f"accuracy against {name}" in text
    assert "W2: no such &lt;bits&gt;" in text
    assert "<title>W8: 8, 79.00</title>" in text


def test_one_size_makes_no_chart_of_sizes(tmp_path: Path) -> None:
    reached = Evaluation(10, 0.8, 1.0, 1.0)
    rows = tuple(
        SweepRow(name, {}, 0, reached, 4000, latency) for name, latency in (("a", 1), ("b", 2))
    )
    write_sweep(Sweep("s", "r", "x86", rows, Machine.here()), tmp_path / "s.html", "m")
    assert "size of the weights" not in (tmp_path / "s.html").read_text()
