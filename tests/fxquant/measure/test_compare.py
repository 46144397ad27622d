"""Layer-wise errors: names, figures, order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.errors import ModelError
from fxquant.measure.compare import difference
from tests.fxquant.small_networks import compiled, images


def test_figures_of_a_difference() -> None:
    a = torch.tensor([3.0, 4.0])
    found = difference("x", "activation", a, torch.tensor([3.0, 4.5]))
    assert found.sqnr_db == pytest.approx(20.0)
    assert found.mse == pytest.approx(0.125)
    assert found.max_error == 0.5
    assert found.cosine == pytest.approx((9 + 18) / 5 / math.sqrt(9 + 20.25))


def test_equal_tensors_have_no_error() -> None:
    found = difference("x", "weight", torch.ones(3), torch.ones(3))
    assert (found.sqnr_db, found.mse, found.cosine) == (math.inf, 0.0, pytest.approx(1.0))


def test_weights_values_and_output_have_rows() -> None:
    rows = fxquant.compare(compiled(), images()).rows
    names = {(row.what, row.name) for row in rows}
    assert {("weight", "stem"), ("weight", "conv1"), ("weight", "head")} <= names
    assert {("activation", "conv1"), ("output", "output")} <= names
    assert all(row.sqnr_db > 15 for row in rows)


@pytest.mark.parametrize("target", ["x86", "reference"])
def test_both_targets_have_the_same_rows(target: str) -> None:
    names = [
        (row.what, row.name) for row in fxquant.compare(compiled(target=target), images()).rows
    ]
    expected = fxquant.compare(compiled(target="reference"), images()).rows
    assert set(names) == {(row.what, row.name) for row in expected}


def test_a_bias_has_a_row_of_what_its_integers_stand_for() -> None:
    q = compiled()
    found = {row.name: row for row in fxquant.compare(q, images()).rows if row.what == "bias"}
    (node,) = [n for n in q.stages["integer"].graph.nodes if n.target == "head.bias"]
    # Rounded to the nearest of its steps, each the product of two scales.
    assert 0 < found["head"].max_error <= 0.5 * float(node.meta["channel_scale"].max())


def test_fewer_bits_are_worse() -> None:
    def worst(bits: int) -> float:
        q = compiled(changes={"weights.bits": bits})
        return fxquant.compare(q, images()).worst(1)[0].sqnr_db

    assert worst(8) > worst(4) > worst(2)


def test_worst_comes_first() -> None:
    found = fxquant.compare(compiled(), images())
    worst = [row.sqnr_db for row in found.worst(4)]
    assert worst == sorted(row.sqnr_db for row in found.rows)[:4]


def test_prints_and_is_data() -> None:
    found = fxquant.compare(compiled(), images())
    assert "SQNR dB" in str(found)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data[0]["what"] == "weight"


def test_a_loaded_file_has_nothing_to_compare_with(tmp_path: Path) -> None:
    compiled().save(tmp_path / "m.fxq")
    with pytest.raises(ModelError, match="holds no float graph"):
        fxquant.compare(fxquant.load(tmp_path / "m.fxq"), images())
