"""The ranges of channels over all the data, measured apart from any rewrite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxquant.errors import CalibrationError
from fxquant.even_out.channel_ranges import measure_ranges
from tests.fxquant.even_out.norm_networks import C, fused, mlp, tokens


def test_outputs_are_measured_over_all_batches() -> None:
    graph_module = fused(mlp())
    x = tokens(6)
    found = measure_ranges(graph_module, ["norm"], [(x[:4],), (x[4:],)], of="outputs")["norm"]
    y = graph_module.get_submodule("norm")(x).detach()
    assert torch.equal(found.low, y.amin((0, 1)))
    assert torch.equal(found.high, y.amax((0, 1)))
    assert torch.equal(found.largest, y.abs().amax((0, 1)))
    assert found.rows == 6 * 4
    assert found.low.shape == (C,)


def test_inputs_are_measured() -> None:
    graph_module = fused(mlp())
    found = measure_ranges(graph_module, ["norm"], [(tokens(),)], of="inputs")["norm"]
    assert torch.equal(found.high, tokens().amax((0, 1)))


def test_without_a_path_the_data_are_not_read() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    assert measure_ranges(fused(mlp()), [], never(), of="outputs") == {}


def test_nothing_looks_on_afterwards() -> None:
    graph_module = fused(mlp())
    measure_ranges(graph_module, ["norm"], [(tokens(),)], of="outputs")
    assert not graph_module.get_submodule("norm")._forward_hooks


def test_no_data_is_refused() -> None:
    with pytest.raises(CalibrationError, match="never seen"):
        measure_ranges(fused(mlp()), ["norm"], [], of="outputs")


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        measure_ranges(fused(mlp()), ["norm"], [(tokens() * float("nan"),)], of="outputs")


def test_data_that_do_not_run_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"batch 1 \(float32\[1, 3\]\)"):
        measure_ranges(fused(mlp()), ["norm"], [(tokens(),), (torch.ones(1, 3),)], of="outputs")
