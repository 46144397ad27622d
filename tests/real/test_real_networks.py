"""Networks with real weights on real images keep their accuracy; they skip where those are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fxquant
from benchmarks.real import NETWORKS, available
from fxquant.compiled import CompiledModel
from fxquant.data import ImageBatches
from fxquant.measure.evaluate import collect_logits, evaluate

pytestmark = pytest.mark.skipif(
    not available(), reason="the real networks and images are not here; set $FXQUANT_DATA to them"
)


@dataclass(frozen=True)
class Goal:
    """What a network must reach on the x86 target: all its validation images, as one pair."""

    drop_points: float
    sqnr_db: float = 0.0
    agreement: float = 0.0


GOALS = {
    "mobilenet_v2": Goal(0.5, 17.4, 0.950),
    "squeezenet1_1": Goal(0.7, 32.7, 0.965),
    "cifar_resnet20": Goal(0.3),
    "cifar_resnet56": Goal(0.3),
    "resnet18_10": Goal(0.3),
    "shufflenet_v2_10": Goal(0.3),
}


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def compile_real(name: str, images: int, recipe: str = "w8a8") -> CompiledModel:
    network = NETWORKS[name]
    return fxquant.compile(network.load(), recipe, calibration=network.calibration_batches(images))


def assert_bit_for_bit(q: CompiledModel, batches: ImageBatches, path: Path) -> None:
    q.save(path)
    reference, loaded = q.to_target("reference"), fxquant.load(path, "reference")
    x86 = fxquant.load(path)
    for images, _ in batches:
        assert torch.equal(reference(images), loaded(images))
        assert torch.equal(q(images), x86(images))


@pytest.fixture(scope="module")
def resnet20() -> CompiledModel:
    return compile_real("cifar_resnet20", 100)


def test_resnet20_keeps_its_accuracy(resnet20: CompiledModel) -> None:
    network = NETWORKS["cifar_resnet20"]
    result = evaluate(resnet20, network.validation_batches(200), reference=network.load())
    assert result.top1_drop is not None
    assert result.agreement is not None
    # One image of 200 is half a point.
    assert result.top1_drop <= 0.015
    assert result.agreement >= 0.97
    assert result.sqnr_db is not None
    assert result.sqnr_db >= 22
    assert resnet20.report.int8_share == 1.0


def test_resnet20_on_x86_is_within_a_step_of_the_reference(resnet20: CompiledModel) -> None:
    assert resnet20.report.target_check["largest_difference"] <= 1
    batches = NETWORKS["cifar_resnet20"].validation_batches(100)
    reference = collect_logits(resnet20.to_target("reference"), batches)
    result = evaluate(resnet20, batches, reference=reference)
    assert result.agreement is not None
    assert result.agreement >= 0.99


def test_resnet20_from_its_file_is_the_same_bit_for_bit(
    resnet20: CompiledModel, tmp_path: Path
) -> None:
    batches = NETWORKS["cifar_resnet20"].validation_batches(100)
    assert_bit_for_bit(resnet20, batches, tmp_path / "m.fxq")


@pytest.mark.slow
@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("name", GOALS)
def test_networks_reach_their_goals(name: str, tmp_path: Path) -> None:
    network, goal = NETWORKS[name], GOALS[name]
    q = compile_real(name, 250)
    model = network.load()
    result = evaluate(q, network.validation_batches(), reference=model, classes=network.classes)
    assert result.top1_drop is not None
    assert result.agreement is not None
    assert result.sqnr_db is not None
    assert result.top1_drop * 100 <= goal.drop_points
    assert result.agreement >= goal.agreement
    assert result.sqnr_db >= goal.sqnr_db
    assert q.report.int8_share >= 0.99
    assert q.report.target_check["largest_difference"] <= 1
    assert_bit_for_bit(q, network.validation_batches(50), tmp_path / "m.fxq")


@pytest.mark.slow
@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("name", "recipe", "drop_points"),
    [
        ("cifar_resnet20", "w4a8_gptq", 0.8),
        ("cifar_resnet20", "w4a4_head_stem8_brecq", 2.0),
        ("resnet18_10", "w4a8_gptq", 1.0),
    ],
)
def test_networks_keep_their_accuracy_in_four_bits(
    name: str, recipe: str, drop_points: float
) -> None:
    network = NETWORKS[name]
    q = compile_real(name, 1024, recipe)
    result = evaluate(q, network.validation_batches(), reference=network.load())
    assert result.top1_drop is not None
    assert result.top1_drop * 100 <= drop_points
