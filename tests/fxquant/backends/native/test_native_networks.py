"""Networks on C++ kernels of our own give the integers of the reference."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.compiled import CompiledModel
from fxquant.errors import CompileError
from fxquant.metrics import Closeness
from passes.infra.verify import flatten
from tests.fxquant.random_networks import OPERATIONS, RandomNetwork

pytestmark = pytest.mark.usefixtures("native")
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"weights.bits": 4},
    {"weights.scheme": "affine"},
    {"activations.bits": 4},
    {"activations.bits": 16, "activations.scheme": "symmetric"},
    {"weights.granularity": "per_tensor", "fusion": "none"},
)


def assert_same(expected: Any, found: Any) -> None:
    left, right = list(flatten(expected)), list(flatten(found))
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, want), (_, got) in zip(left, right, strict=True):
        assert torch.equal(want, got), path


def assert_close(expected: Any, found: Any) -> None:
    closeness = Closeness()
    for (path, want), (other, got) in zip(flatten(expected), flatten(found), strict=True):
        assert path == other
        closeness.add(want, got)
    # Rounding to 2^-24 leaves 144 dB, and a norm of nearly equal values takes some of them; one
    # wrong step of an 8-bit integer would leave 50.
    assert closeness.sqnr_db > 100


def compiled(network: RandomNetwork, changes: dict[str, Any]) -> CompiledModel | None:
    recipe = fxquant.Recipe.named("w8a8").replace(changes)
    try:
        return fxquant.compile(network, recipe, calibration=network.example, target="reference")
    except CompileError as error:
        if "nothing would be quantized" not in str(error):
            raise
        return None


def check_random_network(seed: int) -> None:
    draw = random.Random(seed)
    operations = [draw.choice(OPERATIONS) for _ in range(draw.randint(1, 10))]
    network = RandomNetwork(operations, seed)
    reference = compiled(network, draw.choice(CHANGES))
    if reference is None:
        return
    native = reference.to_target("native")
    for images in (1, 4, 7):
        x = torch.cat([network.example, network.example.flip(0)])[:images]
        if native.report.target_check["output_differing"]:
            # Every integer is right, or the compile would have failed: torch adds floats in
            # another order where a program's value is dense and the reference's a view.
            assert_close(reference(x), native(x))
        else:
            assert_same(reference(x), native(x))


@pytest.mark.parametrize("seed", range(25))
def test_random_networks_give_the_reference_s_integers(seed: int) -> None:
    check_random_network(seed)


def test_floats_that_torch_computes_between_programs_may_be_added_in_another_order() -> None:
    check_random_network(1058)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 100))
def test_two_thousand_random_networks_give_the_reference_s_integers(start: int) -> None:
    for seed in range(start, start + 100):
        check_random_network(seed)


def test_compiles_for_native_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(200, 4))
    x = torch.randn(3, 3, 5, 5)
    q = fxquant.compile(model.eval(), "w8a8", calibration=x, target="native")
    assert q.target == "native"
    assert_same(q.to_target("reference")(x), q(x))


def test_an_image_of_another_size_is_planned_on_first_use() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    q = fxquant.compile(model.eval(), "w8a8", calibration=torch.randn(2, 3, 5, 5), target="native")
    larger = torch.randn(2, 3, 9, 7)
    assert_same(q.to_target("reference")(larger), q(larger))


def test_input_in_any_memory_format() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    q = fxquant.compile(model.eval(), "w8a8", calibration=x, target="native")
    expected = q.to_target("reference")(x)
    assert_same(expected, q(x.contiguous(memory_format=torch.channels_last)))
    assert_same(expected, q(torch.randn(2, 3, 8, 16)[..., ::2].copy_(x)))


def test_nan_counts_as_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    q = fxquant.compile(model.eval(), "w8a8", calibration=x, target="native", check_inputs=False)
    x[0, 1, 2:4] = float("nan")
    x[1, 0, 0, 0] = float("inf")
    assert_same(q.to_target("reference")(x), q(x))


def test_the_report_says_what_sharing_memory_saves() -> None:
    """Of three images, the first is free when the third is written."""
    layers = [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(2, 3, 8, 8)
    q = fxquant.compile(model, "w8a8", calibration=x, target="native")
    (note,) = [note for note in q.report.target_notes if "keeps its values" in note]
    arena, total = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", note)[:2])
    (segment,) = q.stages["native"].native_0.segments
    assert (arena, total) == (segment.arena, segment.total)
    assert 2 * 16 * 64 <= arena < total
