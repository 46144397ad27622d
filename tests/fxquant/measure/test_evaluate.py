import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import DataError, InputError, ModelError
from fxquant.measure.evaluate import collect_logits, evaluate

LOGITS = torch.tensor(
    [[9.0, 1, 2, 3, 4, 5, 6], [1, 9, 2, 3, 4, 5, 6], [1, 2, 3, 9, 4, 5, 6], [0, 9, 5, 4, 3, 2, 1]]
)
LABELS = torch.tensor([0, 1, 2, 6])


def batches(labels: Tensor = LABELS, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Images that already are the logits."""
    return list(zip(LOGITS.split(size), labels.split(size), strict=True))


def identity(images: Tensor) -> Tensor:
    return images


def test_counts_top1_top5_and_loss_over_all_batches() -> None:
    result = evaluate(identity, batches())
    assert (result.images, result.top1, result.top5) == (4, 0.5, 0.75)
    assert result.loss == pytest.approx(float(F.cross_entropy(LOGITS, LABELS)))
    assert result.reference is None
    assert result.agreement is None


def test_top5_of_fewer_than_five_classes() -> None:
    images = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert evaluate(identity, [(images, torch.tensor([1, 1]))]).top5 == 1.0


def test_a_pair_says_agreement_sqnr_and_drop() -> None:
    def worse(images: Tensor) -> Tensor:
        images = images.clone()
        images[images[:, 0] == 9, 6] = 10
        return images

    result = evaluate(worse, batches(), reference=identity)
    assert result.agreement == 0.75
    assert result.top1_drop == 0.25
    expected = 10 * math.log10(float(LOGITS.double().square().sum()) / 16)
    assert result.sqnr_db == pytest.approx(expected)
    assert "75.00 %" in str(result)


def test_recorded_logits_are_a_reference() -> None:
    recorded = collect_logits(identity, batches())
    result = evaluate(identity, batches(), reference=recorded)
    assert result.sqnr_db == math.inf
    assert result.agreement == 1.0


def test_recorded_logits_of_other_batches_are_an_error() -> None:
    with pytest.raises(InputError, match="fewer batches"):
        evaluate(identity, batches(), reference=collect_logits(identity, batches())[:1])
    with pytest.raises(InputError, match="same batches"):
        evaluate(identity, batches(size=2), reference=collect_logits(identity, batches()))


def test_json_is_finite() -> None:
    data = evaluate(identity, batches(), reference=identity).to_json()
    assert data["sqnr_db"] is None
    assert json.loads(json.dumps(data, allow_nan=False))["reference"]["top1"] == 0.5


def test_images_without_labels_still_agree() -> None:
    result = evaluate(identity, [LOGITS], reference=identity)
    assert (result.top1, result.loss, result.agreement) == (None, None, 1.0)


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_out_of_range_is_an_error(label: int) -> None:
    labels = LABELS.clone()
    labels[2] = label
    with pytest.raises(DataError, match=f"image 2: label {label} is out of range: .* 7 classes"):
        evaluate(identity, batches(labels))


def test_an_output_with_several_tensors_is_judged_by_its_first() -> None:
    assert evaluate(lambda x: {"out": (x, x * 0)}, batches()).top1 == 0.5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Dropout(), "training mode"),
        (lambda x: x[0], r"a tensor of \[7\]"),
        (lambda x: "cat", "gives str"),
    ],
)
def test_a_model_that_is_no_classifier_is_an_error(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        evaluate(model, batches())


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(identity, [])
