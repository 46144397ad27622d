"""Graphs that nobody thought of: the integers are right, on both targets and from a file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant.backends import check_operations
from fxquant.compiled import CompiledModel
from fxquant.errors import CompileError
from passes.infra.verify import flatten
from tests.fxquant.random_networks import OPERATIONS, RandomNetwork
from tests.fxquant.simulation import Float64Check

networks = st.builds(
    RandomNetwork,
    st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=10),
    st.integers(0, 10**6),
)
recipes = st.fixed_dictionaries(
    {
        "fusion": st.sampled_from(["all", "all", "blocks", "none"]),
        "fold_batch_norm": st.sampled_from([True, True, False]),
        "quantize_output": st.booleans(),
        "equalize": st.sampled_from([False, False, True]),
        "bias_correction": st.sampled_from([False, False, True]),
        "weights.bits": st.sampled_from([8, 8, 8, 4]),
        "weights.scheme": st.sampled_from(["symmetric", "symmetric", "affine"]),
        "weights.granularity": st.sampled_from(["per_channel", "per_channel", "per_tensor"]),
        "activations.bits": st.sampled_from([8, 8, 8, 8, 4, 16]),
        "activations.observer": st.sampled_from(["min_max", "min_max", "mse"]),
        "activations.reduce_range": st.sampled_from([False, False, True]),
    }
)


# In 1 of 25 draws all that was quantized does not lead to an output; 500 are compiled.
@settings(
    max_examples=540, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(network=networks, changes=recipes, draw=st.integers(0, 9))
def test_integers_are_right(
    network: RandomNetwork,
    changes: dict[str, Any],
    draw: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    q = _compiled(network, changes)
    if q is None:
        return
    x = network.example
    integer, simulated = q.stages["integer"], q.stages["simulated"]

    simulation = Float64Check(integer, simulated)
    with torch.no_grad():
        expected = simulation.run(x)
        floats = simulated(x)
    assert max(simulation.steps.values(), default=0) <= 1, simulation.steps
    assert max(simulation.excess.values(), default=0.0) <= 1.0, simulation.excess
    bits = min(changes["weights.bits"], changes["activations.bits"])
    _assert_close(floats, expected, share=1e-2 if bits >= 8 else 2e-1)

    # The report's check ran on one image; these are others.
    assert q.report.target_check["largest_difference"] <= 1
    found = check_operations(integer, q.stages["x86"], (x,))
    assert found.largest <= 1, [entry for entry in found.operations if entry.largest > 1]

    other = torch.cat([x, x.flip(0)])[:7]
    reference = q.to_target("reference")
    _assert_same_shapes(network(other), q(other))
    with torch.no_grad():
        _assert_equal(q.stages["x86"](other), q(other))
    _assert_equal(expected, reference(x))
    if draw == 0:
        path = tmp_path_factory.mktemp("drawn") / "m.fxq"
        q.save(path)
        _assert_equal(reference(other), fxquant.load(path, "reference")(other))
        _assert_equal(q(other), fxquant.load(path)(other))


def _compiled(network: RandomNetwork, changes: dict[str, Any]) -> CompiledModel | None:
    """None for the few draws whose layers the recipe leaves nothing to do for."""
    if changes["activations.bits"] == 16:
        changes |= {"activations.scheme": "symmetric", "activations.reduce_range": False}
    recipe = fxquant.Recipe.named("w8a8").replace(changes)
    try:
        return fxquant.compile(network, recipe, calibration=network.example)
    except CompileError as error:
        if "nothing would be quantized" not in str(error):
            raise
        return None


def _assert_same_shapes(expected: Any, found: Any) -> None:
    assert type(expected) is type(found)
    left = [(path, value.shape) for path, value in flatten(expected)]
    assert left == [(path, value.shape) for path, value in flatten(found)]


def _assert_equal(expected: Any, found: Any) -> None:
    left, right = list(flatten(expected)), list(flatten(found))
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert torch.equal(a, b), path


def _assert_close(floats: Any, integers: Any, share: float) -> None:
    """The simulated graph and the integers part only where a value lies next to a tie.

    A tie that falls to the other side moves one value by one step. Sums of a few codes tie
    often, and an average can be as small as ten steps, so that one value in ten may lose a
    hundredth of its square; of 16 steps, 4 bits, it may lose ten times as much. A scale that is
    wrong anywhere costs more than that.
    """
    for (_, a), (_, b) in zip(flatten(floats), flatten(integers), strict=True):
        assert isinstance(a, Tensor)
        noise, signal = (a - b).double().square().sum(), a.double().square().sum()
        assert noise <= share * signal + 1e-12
