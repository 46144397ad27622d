"""Reparameterization gives all channels of a layer norm one grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxquant.even_out.reparameterize import Reparameterize
from passes import copy_sharing_tensors
from tests.fxquant.even_out.norm_networks import (
    NETWORKS,
    attention,
    fused,
    measured,
    mlp,
    run,
    tokens,
)
from tests.passes.checking import check

ENOUGH = 512  # images of one row and more


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same(name: str) -> None:
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    x = inputs(ENOUGH).double()
    graph_module = fused(model, x[:1])
    with torch.no_grad():
        expected = model(x)
        record = run(Reparameterize(measured(graph_module, x)), graph_module, x[:1])
        found = graph_module(x)
    assert record.verified == "same outputs"
    assert record.diff.startswith("~ ")
    # In float64 nothing but an error of the rewrite is seen: sums of 16 terms of at most some
    # hundreds times the result, each rounded by 2^-53 a few times, stay below 2^-40.
    assert torch.allclose(found, expected, rtol=0, atol=2**-40 * float(expected.abs().max()))
    assert all(tensor.dtype == torch.float64 for tensor in graph_module.state_dict().values())


def test_keeps_what_every_pass_promises() -> None:
    graph_module = fused(mlp())
    checked = check(
        Reparameterize(measured(graph_module, tokens(ENOUGH))),
        graph_module,
        tokens(1),
        modified=True,
    )
    assert checked.declines == ()


def test_a_norm_that_was_not_measured_as_it_is_declines() -> None:
    graph_module = fused(mlp())
    step = Reparameterize(measured(graph_module, tokens(ENOUGH)))
    step.run(graph_module)
    (decline,) = step.run(graph_module).declines
    assert decline.path == "norm"
    assert "not measured" in decline.reason


def test_the_model_keeps_its_weights() -> None:
    model = attention()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph_module = fused(model)
    shared = copy_sharing_tensors(graph_module)
    assert Reparameterize(measured(graph_module, tokens(ENOUGH))).run(graph_module).modified
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(shared(tokens()), model(tokens()))


def test_a_channel_that_is_always_zero_keeps_its_scale() -> None:
    model: Any = mlp()
    model.norm.weight.data[2] = model.norm.bias.data[2] = 0.0
    model.fc1.weight.data[:, 5] = 0.0
    graph_module = fused(model)
    run(Reparameterize(measured(graph_module, tokens(ENOUGH))), graph_module, tokens())
    assert all(bool(tensor.isfinite().all()) for tensor in graph_module.state_dict().values())


def test_reparameterized_channels_have_one_grid() -> None:
    model: Any = mlp()
    graph_module = fused(model)
    x = tokens(ENOUGH)
    found = measured(graph_module, x)
    low, high = found["norm"].low.double(), found["norm"].high.double()
    s = (high - low) / 255
    z = -low / s
    codes = model.norm(x).detach().double() / s + z
    run(Reparameterize(found), graph_module, x[:1])
    changed: Any = graph_module.get_submodule("norm")
    assert torch.allclose(
        changed(x).detach().double() / s.mean() + z.mean(), codes, atol=255 * 2**-18
    )
    after = measured(graph_module, x)["norm"]
    widths = after.high - after.low
    assert float(widths.max() / widths.min()) < 1 + 1e-4


def test_what_was_seen_in_few_rows_declines() -> None:
    graph_module = fused(mlp())
    record = run(Reparameterize(measured(graph_module, tokens(127))), graph_module, tokens())
    assert not record.modified
    assert [decline.reason for decline in record.declines] == ["seen in fewer than 512 rows"]
