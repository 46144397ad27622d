"""Targets are met by raising what costs most, and the report says what was raised."""

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import AccuracyError, DataError, InputError
from fxquant.recipe import Recipe
from tests.fxquant.small_networks import Residual, images

AS_MEASURED = fxquant.Drop(2, confidence=0.5)


def few_bits() -> Recipe:
    return Recipe.named("w2a8")


def labelled(model: nn.Module, count: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Noise, labelled by the float model itself: its top-1 is 100 %."""
    x = images(count)
    with torch.no_grad():
        return list(zip(x.split(16), model(x).argmax(1).split(16), strict=True))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Its classes are about as frequent as one another."""
    torch.manual_seed(0)
    network = Residual()
    with torch.no_grad():
        network.head.bias -= network(images(64)).mean(0)
    return network


def test_a_target_that_holds_at_once_raises_nothing(network: nn.Module) -> None:
    q = fxquant.compile(
        network, "w8a8", calibration=labelled(network), accuracy_target=fxquant.Drop(50)
    )
    trail = q.report.accuracy
    assert trail is not None
    assert [step.raised for step in trail.steps] == [()]
    assert trail.float_value == 100


def test_what_costs_most_is_raised_until_the_target_holds(network: nn.Module) -> None:
    data = labelled(network)
    plain = fxquant.compile(network, few_bits(), calibration=data, target="reference")
    before = fxquant.evaluate(plain, data, metric=fxquant.Metric(right, per_batch=True)).metric
    q = fxquant.compile(
        network, few_bits(), calibration=data, target="reference", accuracy_target=AS_MEASURED
    )
    trail = q.report.accuracy
    assert trail is not None
    assert before is not None
    assert before < 98
    assert trail.steps[0].metric == before
    top1 = fxquant.evaluate(q, data).top1
    assert top1 is not None
    assert top1 >= 0.98
    raised = {path for path, spec in weight_bits(q).items() if spec == 8}
    named = {name for name in raised if f"weights of {name}: 2 -> 8 bits" in flat(trail)}
    assert raised
    assert raised == named


def test_what_chance_may_add_has_to_stay_below_the_target_too(network: nn.Module) -> None:
    data = labelled(network, 256)
    measured, confident = (
        fxquant.compile(
            network,
            few_bits(),
            calibration=data,
            target="reference",
            accuracy_target=fxquant.Drop(6, confidence=confidence),
        ).report.accuracy
        for confidence in (0.5, 0.95)
    )
    assert measured is not None
    assert confident is not None
    assert measured.bound == measured.drop
    assert confident.drop < confident.bound <= 6
    assert "with a confidence of 95% by at most" in str(confident)
    refused = [step for step in confident.steps if step.bound is not None and step.bound > 6]
    assert any(confident.drop_of(step) <= 6 for step in refused)


def test_images_that_are_too_few_to_show_a_target_are_named(network: nn.Module) -> None:
    with pytest.raises(InputError, match=r"64 images cannot show .* give at least 464"):
        fxquant.compile(
            network, "w8a8", calibration=labelled(network), accuracy_target=fxquant.Drop(0.5)
        )


def test_a_sensitive_layer_is_the_first_to_be_raised() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    with torch.no_grad():
        # One large weight a row leaves all others of the middle layer on two steps of its grid.
        model[2].weight[:, 0] = 4.0
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(2))
    model.eval()
    with torch.no_grad():
        data = [(x, model(x))]
    q = fxquant.compile(
        model,
        "w4a8",
        calibration=data,
        target="reference",
        accuracy_target=fxquant.Drop(1e-4),
        metric=fxquant.Metric(squared, larger_is_better=False),
    )
    trail = q.report.accuracy
    assert trail is not None
    first = next(
        step
        for step in trail.steps
        if any("weights" in text for text in step.raised if text[0] != ":")
    )
    assert first.raised == ("weights of 2: 4 -> 8 bits",)


def test_a_target_out_of_reach_says_so_and_hands_over_the_nearest() -> None:
    torch.manual_seed(0)
    model = Residual()

    def impossible(model: nn.Module, batches: object) -> float:
        return 0.0 if isinstance(model, fxquant.CompiledModel) else 1.0

    with pytest.raises(AccuracyError, match="drops by 1 against float's 1") as caught:
        fxquant.compile(
            model,
            "w8a8",
            calibration=labelled(model, 16),
            target="reference",
            accuracy_target=fxquant.Drop(0.5, steps=4),
            metric=impossible,
        )
    assert "NOT REACHED" in str(caught.value.best.report)
    assert len(caught.value.best.report.accuracy.steps) == 4


def test_float_comes_last(network: nn.Module) -> None:
    def float_only(model: nn.Module, batches: object) -> float:
        if not isinstance(model, fxquant.CompiledModel):
            return 1.0
        return float(any(row.runs_in == "float" for row in model.report.coverage))

    q = fxquant.compile(
        network,
        "w8a8",
        calibration=labelled(network, 16),
        target="reference",
        accuracy_target=fxquant.Drop(0.5),
        metric=float_only,
    )
    trail = q.report.accuracy
    assert trail is not None
    texts = [" ".join(step.raised) for step in trail.steps]
    assert "float" in texts[-1]
    assert not any("float" in text for text in texts[:2])
    assert any("8 -> 16 bits" in text for text in texts)


def test_the_steps_are_in_the_file(network: nn.Module, tmp_path: object) -> None:
    q = fxquant.compile(
        network, few_bits(), calibration=labelled(network), accuracy_target=fxquant.Drop(20)
    )
    q.save(f"{tmp_path}/m.fxq")
    assert fxquant.load(f"{tmp_path}/m.fxq").report.accuracy == q.report.accuracy


def test_without_labels_top1_cannot_be_a_target(network: nn.Module) -> None:
    with pytest.raises(DataError, match="needs targets"):
        fxquant.compile(network, "w8a8", calibration=images(), accuracy_target=fxquant.Drop(1))


def test_a_metric_alone_is_an_error(network: nn.Module) -> None:
    with pytest.raises(InputError, match="accuracy_target"):
        fxquant.compile(network, "w8a8", calibration=images(), metric=squared)


def test_a_number_is_no_target(network: nn.Module) -> None:
    with pytest.raises(InputError, match=r"give fxquant.Drop\(0.5\)"):
        fxquant.compile(network, "w8a8", calibration=images(), accuracy_target=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.4, 1.0, 95])
def test_a_confidence_is_a_share_of_at_least_one_half(confidence: float) -> None:
    with pytest.raises(InputError, match=r"confidence is .*, expected at least 0\.5"):
        fxquant.Drop(1, confidence=confidence)


def test_a_checkpoint_is_of_one_recipe(network: nn.Module) -> None:
    with pytest.raises(InputError, match="tries several"):
        fxquant.compile(
            network,
            "w4a8_adaround",
            calibration=labelled(network, 16),
            checkpoint="c.pt",
            accuracy_target=fxquant.Drop(1),
        )


@pytest.mark.parametrize("most", [-1, float("nan"), "0.5", True])
def test_a_drop_is_a_positive_number(most: object) -> None:
    with pytest.raises(InputError, match=r"positive number|expected a number"):
        fxquant.Drop(most)  # type: ignore[arg-type]


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (outputs.argmax(1) == targets).double()


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def weight_bits(q: fxquant.CompiledModel) -> dict[str, int]:
    assert q.plan is not None
    return {name: spec.bits for name, spec in q.plan.weights.items()}


def flat(trail: object) -> str:
    return " ".join(text for step in trail.steps for text in step.raised)  # type: ignore[attr-defined]
