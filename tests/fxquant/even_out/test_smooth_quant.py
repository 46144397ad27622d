"""SmoothQuant moves range from layer norms into the layers behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxquant.errors import RecipeError
from fxquant.even_out.smooth_quant import SmoothQuant
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


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same(name: str) -> None:
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    x = inputs(3).double()
    graph_module = fused(model, x[:1])
    with torch.no_grad():
        expected = model(x)
        record = run(SmoothQuant(measured(graph_module, x)), graph_module, x[:1])
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
        SmoothQuant(measured(graph_module, tokens(3))), graph_module, tokens(1), modified=True
    )
    assert checked.declines == ()


def test_a_norm_that_was_not_measured_as_it_is_declines() -> None:
    graph_module = fused(mlp())
    step = SmoothQuant(measured(graph_module, tokens(3)))
    step.run(graph_module)
    (decline,) = step.run(graph_module).declines
    assert decline.path == "norm"
    assert "not measured" in decline.reason


def test_the_model_keeps_its_weights() -> None:
    model = attention()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph_module = fused(model)
    shared = copy_sharing_tensors(graph_module)
    assert SmoothQuant(measured(graph_module, tokens(3))).run(graph_module).modified
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(shared(tokens()), model(tokens()))


def test_a_channel_that_is_always_zero_keeps_its_scale() -> None:
    model: Any = mlp()
    model.norm.weight.data[2] = model.norm.bias.data[2] = 0.0
    model.fc1.weight.data[:, 5] = 0.0
    graph_module = fused(model)
    run(SmoothQuant(measured(graph_module, tokens(3))), graph_module, tokens())
    assert all(bool(tensor.isfinite().all()) for tensor in graph_module.state_dict().values())


def test_alpha_one_gives_all_channels_the_same_largest_value() -> None:
    graph_module = fused(mlp())
    run(SmoothQuant(measured(graph_module, tokens()), 1.0), graph_module, tokens())
    largest = measured(graph_module, tokens())["norm"].largest
    assert torch.allclose(largest, largest.mean(), rtol=1e-5)


def test_the_scale_is_equation_4() -> None:
    model: Any = attention()
    graph_module = fused(model)
    run(SmoothQuant(measured(graph_module, tokens()), 0.25), graph_module, tokens())
    x = model.norm(tokens()).detach().abs().amax((0, 1))
    w = torch.cat([model.q.weight, model.k.weight, model.v.weight]).detach().abs().amax(0)
    scale = x**0.25 / w**0.75
    changed: Any = graph_module.get_submodule("norm")
    assert torch.allclose(changed.weight, model.norm.weight / scale, rtol=1e-5)


def test_an_alpha_above_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        SmoothQuant({}, 1.5)
