import math

import pytest
import torch

from fxquant.errors import DataError, ModelError
from fxquant.metrics import Accuracy, Closeness, first_tensor, labelled_logits, labels_of

REFERENCE = torch.tensor([[3.0, 1.0], [0.0, 2.0]])


def test_sqnr_is_signal_over_noise_of_all_batches() -> None:
    closeness = Closeness()
    for reference in REFERENCE.split(1):
        closeness.add(reference, reference + 0.1)

    assert closeness.sqnr_db == pytest.approx(10 * math.log10(14 / (4 * 0.1**2)), rel=1e-6)


@pytest.mark.parametrize(
    ("reference", "found", "expected"),
    [(1.0, 1.0, math.inf), (0.0, 1.0, -math.inf), (1.0, math.nan, -math.inf)],
)
def test_sqnr_of_equal_values_of_no_signal_and_of_nan(
    reference: float, found: float, expected: float
) -> None:
    closeness = Closeness()
    closeness.add(torch.tensor([reference]), torch.tensor([found]))

    assert closeness.sqnr_db == expected


def test_agreement_counts_equal_argmax() -> None:
    closeness = Closeness()
    closeness.add(REFERENCE, torch.tensor([[9.0, 1.0], [3.0, 2.0]]))

    assert closeness.agreement == 0.5


def test_outputs_that_are_no_logits_have_no_agreement() -> None:
    closeness = Closeness()
    closeness.add(REFERENCE, REFERENCE)
    closeness.add(REFERENCE.reshape(1, 2, 2), REFERENCE.reshape(1, 2, 2))

    assert closeness.agreement is None


def test_accuracy_is_of_the_labelled_images_alone() -> None:
    accuracy = Accuracy()
    accuracy.add(REFERENCE, torch.tensor([0, 0]))
    accuracy.add(REFERENCE, None)

    assert (accuracy.images, accuracy.top1, accuracy.top5) == (4, 0.5, 1.0)


@pytest.mark.parametrize(
    "batch",
    [REFERENCE, (REFERENCE,), (REFERENCE, None), (REFERENCE, torch.tensor([-1, -1]))],
)
def test_batches_without_labels(batch: object) -> None:
    assert labels_of(batch) is None


def test_labels_stand_behind_the_inputs() -> None:
    assert labels_of((REFERENCE, REFERENCE, "labels"), inputs=2) == "labels"


def test_no_batches_are_an_error() -> None:
    with pytest.raises(DataError, match="the batches are empty"):
        list(labelled_logits(torch.nn.Identity().eval(), []))


def test_a_label_out_of_range_names_its_image() -> None:
    batches = [(REFERENCE, torch.tensor([0, 1])), (REFERENCE, torch.tensor([0, 2]))]

    with pytest.raises(DataError, match="image 3: label 2 is out of range"):
        list(labelled_logits(torch.nn.Identity().eval(), batches))


def test_the_first_float_tensor_of_an_output() -> None:
    output = {"indices": torch.tensor([1]), "values": [REFERENCE, REFERENCE + 1]}

    assert first_tensor(output) is REFERENCE
    with pytest.raises(ModelError, match="holds no float tensor"):
        first_tensor(torch.tensor([1]))
