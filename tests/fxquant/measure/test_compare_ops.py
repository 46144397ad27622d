"""One operation replaced at a time, and quantizers by themselves."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import RecipeError
from fxquant.measure.alone import Alone
from fxquant.measure.compare_ops import BASELINE, FORMS, OperationCosts, compare_ops
from tests.fxquant.small_networks import Residual, images


class Tokens(nn.Module):
    """A patch embedding, one attention, one GELU and their residuals: 3×8×8 to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm1 = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.project = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(8)
        self.rise = nn.Linear(8, 16)
        self.fall = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(1, 2), dim=-1)
        x = x + self.project(weights @ v)
        x = x + self.fall(F.gelu(self.rise(self.norm2(x))))
        return self.head(x.mean(1))


FEW = ("softmax table", "softmax log2", "residual 8 bits, LayerNorm integer")


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return Tokens()


@pytest.fixture(scope="module")
def costs() -> OperationCosts:
    return compare_ops(
        tokens(),
        "vit_w8a8_integer",
        [images(4), images(2)],
        forms={name: FORMS[name] for name in FEW},
        worst=3,
        value_images=5,
    )


def test_the_baseline_comes_first_and_the_recipe_last(costs: OperationCosts) -> None:
    names = [row.name for row in costs.of("operation")]
    assert names == [BASELINE, *FEW, "all of vit_w8a8_integer"]
    assert not any(row.error for row in costs.rows)
    assert costs.images == 6


def test_costs_are_decibels_below_the_baseline(costs: OperationCosts) -> None:
    baseline, *others = costs.of("operation")
    assert baseline.sqnr_db is not None
    assert baseline.sqnr_db > 15
    assert baseline.cost_db is None
    for row in others:
        assert row.sqnr_db is not None
        assert row.cost_db == pytest.approx(baseline.sqnr_db - row.sqnr_db)
        assert row.baseline_sqnr_db is not None
        assert row.agreement is not None


def test_a_coarser_form_costs_more(costs: OperationCosts) -> None:
    rows = {row.name: row.sqnr_db or 0.0 for row in costs.rows}
    assert rows["softmax table"] > rows["softmax log2"]


def test_a_figure_is_that_of_the_simulated_graph(costs: OperationCosts) -> None:
    model, x = tokens(), torch.cat([images(4), images(2)])
    q = fxquant.compile(
        model, "vit_w8a8_integer", calibration=[images(4), images(2)], target="reference"
    )
    expected = fxquant.evaluate(q.stages["simulated"], [x], reference=model).sqnr_db
    found = costs.of("operation")[-1].sqnr_db
    assert found == pytest.approx(expected, abs=1e-4)


def test_quantizers_are_grouped(costs: OperationCosts) -> None:
    names = [row.name for row in costs.of("quantizers")]
    assert names[0] == "weights (6)"
    assert names[1].startswith("activations (")
    assert "input values (1)" in names
    assert "softmax values (1)" in names
    assert "gelu values (1)" in names


def test_the_worst_values_come_first(costs: OperationCosts) -> None:
    found = [row.sqnr_db for row in costs.of("value")]
    assert len(found) == 3
    assert found == sorted(found, key=lambda value: value or 0.0)
    assert costs.value_images == 5


def test_prints_and_is_data(costs: OperationCosts) -> None:
    assert "softmax log2" in str(costs)
    assert "the worst single values, on 5 images" in str(costs)
    data = json.loads(json.dumps(costs.to_json(), allow_nan=False))
    assert data["rows"][0]["name"] == BASELINE


def test_only_what_the_network_has_is_replaced() -> None:
    found = compare_ops(Residual(), "w8a8", images(), worst=0)
    assert [row.name for row in found.of("operation")] == [BASELINE, "all of w8a8"]
    assert found.of("value") == ()
    assert "worst" not in str(found)


def test_overrides_of_operations_are_in_float_in_the_baseline() -> None:
    recipe = fxquant.Recipe.named("vit_w8a8").replace(
        {"overrides": [{"type": "LayerNorm", "operations": {"layer_norm": "power_of_two"}}]}
    )
    plain = compare_ops(tokens(), "vit_w8a8", images(), forms={}, worst=0)
    found = compare_ops(tokens(), recipe, images(), forms={}, worst=0)
    assert found.rows[0].sqnr_db == plain.rows[0].sqnr_db
    assert found.rows[1].sqnr_db != plain.rows[0].sqnr_db


def test_a_form_that_fails_says_why_in_its_row() -> None:
    # On integers alone, nothing may stay float: not even the softmax.
    recipe = fxquant.Recipe.named("vit_w8a8_integer").replace({"operations.softmax": "float"})
    found = compare_ops(tokens(), recipe, images(), forms={}, worst=0)
    assert "softmax" in found.rows[1].error
    assert found.rows[1].error in str(found)
    assert found.of("quantizers")


def test_a_wrong_form_is_an_error() -> None:
    with pytest.raises(RecipeError, match="softmax"):
        compare_ops(tokens(), "vit_w8a8", images(), forms={"mine": {"softmax": "exact"}})


def test_with_all_quantizers_off_the_graph_is_the_float_network() -> None:
    model, x = tokens(), images()
    q = fxquant.compile(model, "vit_w8a8_integer", calibration=x, target="reference")
    before = q.stages["simulated"](x)
    alone = Alone(q.stages["fused"], q.stages["simulated"])
    with torch.no_grad():
        torch.testing.assert_close(alone.graph(x), model(x), rtol=1e-4, atol=1e-5)
        groups = dict(alone.groups([(x,)]))
    assert all(math.isfinite(float(outputs.sum())) for outputs in groups.values())
    assert torch.equal(q.stages["simulated"](x), before)


def test_a_single_value_is_quantized_alone() -> None:
    x = images()
    q = fxquant.compile(tokens(), "vit_w8a8", calibration=x, target="reference")
    alone = Alone(q.stages["fused"], q.stages["simulated"])
    found = {name: outputs for name, _, outputs in alone.values_alone([(x,)])}
    assert len(found) == len(alone.values)
    quantizer = alone.values["quantizers.x"]
    with torch.no_grad():
        expected = alone.graph(quantizer.qparams.fake_quantize(x))
    torch.testing.assert_close(found["x"], expected)
