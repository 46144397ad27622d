"""Metrics of a user's own: of a whole model or of a batch, larger or smaller is better."""

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import DataError, InputError, ModelError
from fxquant.measure.evaluate import evaluate
from fxquant.measure.metric import TOP1, Metric, as_metric

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
TWO_BATCHES = [(X[:2], X[:2] + 1), (X[2:], X[2:] + 4)]


def identity(x: Tensor) -> Tensor:
    return x


def landmark_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean distance of the points of each sample [N, 2·points], in pixels."""
    gaps = (outputs - targets).unflatten(1, (-1, 2))
    return gaps.norm(dim=2).mean(1)


def mean_iou(model: nn.Module, batches: Iterable[Any]) -> float:
    """Mean over the classes of intersection over union, in percent; of class maps [N, H, W]."""
    confusion = torch.zeros(3, 3)
    for images, maps in batches:
        found = model(images)["out"].argmax(1)
        confusion += torch.bincount((3 * maps + found).flatten(), minlength=9).view(3, 3)
    both = confusion.diagonal()
    return float(100 * (both / (confusion.sum(0) + confusion.sum(1) - both)).mean())


def mean_average_precision(model: nn.Module, batches: Iterable[Any]) -> float:
    """At IoU 0.5, in percent, of a detector: images → [{"boxes", "scores", "labels"}]."""
    from torchvision.ops import box_iou

    hits: dict[int, list[tuple[float, bool]]] = {}
    wanted: dict[int, int] = {}
    for images, targets in batches:
        for found, target in zip(model(images), targets, strict=True):
            for label in target["labels"].tolist():
                wanted[label] = wanted.get(label, 0) + 1
            free = list(range(len(target["labels"])))
            for index in found["scores"].argsort(descending=True).tolist():
                label = int(found["labels"][index])
                overlaps = box_iou(found["boxes"][index : index + 1], target["boxes"])[0]
                fits = [i for i in free if overlaps[i] >= 0.5 and int(target["labels"][i]) == label]
                if fits:
                    free.remove(max(fits, key=lambda i: float(overlaps[i])))
                hits.setdefault(label, []).append((float(found["scores"][index]), bool(fits)))
    precisions = []
    for label, count in wanted.items():
        right = torch.tensor([hit for _, hit in sorted(hits.get(label, []), reverse=True)])
        recalled = right.cumsum(0)
        precision = recalled / torch.arange(1, len(right) + 1)
        precisions.append(float((precision * right).sum()) / count)
    return 100 * sum(precisions) / len(precisions)


def test_a_value_a_sample_is_averaged_over_the_samples() -> None:
    distances = [2**0.5, 2**0.5, 32**0.5]
    assert Metric(landmark_error)(identity, TWO_BATCHES) == pytest.approx(sum(distances) / 3)


def test_one_value_a_batch_counts_as_often_as_it_has_samples() -> None:
    def error(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    assert Metric(error)(identity, TWO_BATCHES) == pytest.approx((1 + 1 + 4) / 3)


def test_a_metric_may_run_the_model_itself() -> None:
    maps = torch.tensor([[[0, 1], [2, 2]]])
    logits = nn.functional.one_hot(torch.tensor([[[0, 1], [2, 1]]]), 3).permute(0, 3, 1, 2).float()
    # Classes 0, 1, 2: intersections 1, 1, 1 over unions 1, 2, 2.
    assert Metric(mean_iou)(lambda x: {"out": x}, [(logits, maps)]) == pytest.approx(200 / 3)


def test_a_detector_is_judged_by_its_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    found = {
        "boxes": torch.tensor([[0.0, 0, 10, 9], [50, 50, 60, 60], [20, 20, 30, 31]]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([1, 1, 1]),
    }
    # Precision is 1 at the first box that is right, 2/3 at the second.
    value = Metric(mean_average_precision)(lambda x: [found], [(torch.zeros(1, 3, 8, 8), [target])])
    assert value == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_several_targets_are_a_tuple() -> None:
    def both(outputs: Tensor, targets: Any) -> Tensor:
        first, second = targets
        return (outputs - first - second).sum()

    assert Metric(both)(identity, [(X, X, X * 0)]) == 0


def test_smaller_may_be_better() -> None:
    error = Metric(landmark_error, larger_is_better=False)
    assert error.drop(reference=1.0, found=1.5) == 0.5
    assert TOP1.drop(reference=80.0, found=79.0) == 1.0


def test_evaluate_takes_a_metric_for_outputs_that_are_no_logits() -> None:
    result = evaluate(
        lambda x: x + 1,
        TWO_BATCHES,
        reference=identity,
        metric=Metric(landmark_error, larger_is_better=False),
    )
    assert result.reference is not None
    assert result.images == 3
    assert result.metric == pytest.approx(18**0.5 / 3)
    assert result.drop == pytest.approx(result.metric - result.reference.metric)
    assert result.top1 is None
    assert "landmark_error" in str(result)


def test_evaluate_of_a_plain_function_reads_an_iterator_once() -> None:
    result = evaluate(identity, iter(TWO_BATCHES), reference=identity, metric=landmark_error)
    assert (result.images, result.drop) == (3, 0)


def unclear(a: Any, b: Any) -> float:
    return 0.0


def failing(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.no_such_method()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("metric", "batches", "error", "message"),
    [
        (unclear, TWO_BATCHES, InputError, "call its first parameter `model`"),
        ("top1", TWO_BATCHES, InputError, "function is 'top1', expected a function"),
        (failing, TWO_BATCHES, InputError, "metric failing failed: AttributeError"),
        (lambda outputs, targets: outputs, TWO_BATCHES, InputError, r"a tensor of \[2, 2\]"),
        (lambda outputs, targets: torch.nan, TWO_BATCHES, InputError, "gives NaN"),
        (landmark_error, [X], DataError, "needs targets"),
        (landmark_error, [], DataError, "the batches are empty"),
    ],
)
def test_what_is_wrong_with_a_metric_is_said(
    metric: Callable[..., Any], batches: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        as_metric(metric)(identity, batches)


def test_a_model_in_training_mode_is_not_measured() -> None:
    with pytest.raises(ModelError, match=r"call model.eval\(\)"):
        fxquant.Metric(landmark_error)(nn.Identity().train(), TWO_BATCHES)


def test_the_docs_have_the_functions_of_this_file() -> None:
    page = (Path(fxquant.__file__).parents[1] / "docs" / "accuracy_targets.md").read_text()
    blocks = re.findall(r"```python\n(def .*?)```", page, re.DOTALL)
    here = ast.parse(Path(__file__).read_text()).body
    tested = {f.name: ast.dump(f) for f in here if isinstance(f, ast.FunctionDef)}
    shown = [f for block in blocks for f in ast.parse(block).body if isinstance(f, ast.FunctionDef)]
    assert [f.name for f in shown] == ["landmark_error", "mean_iou", "mean_average_precision"]
    for function in shown:
        assert ast.dump(function) == tested[function.name]
