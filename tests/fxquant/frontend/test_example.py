"""Dynamic quantization needs no data: the first layer tells what the model takes."""

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ModelError
from fxquant.frontend.example import guess_example


class LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 4)), [2, 8]),
        (nn.Sequential(nn.Linear(8, 4), nn.Conv1d(4, 2, 1)), [2, 4, 8]),
        (LastStep(), [4, 2, 6]),
        (
            nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(1800, 2)),
            [1, 3, 32, 32],
        ),
    ],
)
def test_the_first_layer_tells_the_input(model: nn.Module, shape: list[int]) -> None:
    example = guess_example(model.eval())
    assert example is not None
    assert list(example.shape) == shape


def test_dynamic_quantization_needs_no_calibration() -> None:
    model = LastStep()
    q = fxquant.compile(model, "dynamic_w8a8", target="reference")
    x = torch.randn(3, 5, 6)
    assert (q(x) - model(x)).norm() < 0.05 * model(x).norm()
    assert "no example input was given" in str(q.report)


def test_a_model_in_training_mode_is_not_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).train()
    with pytest.raises(ModelError, match="training mode"):
        guess_example(model)
    assert model[1].num_batches_tracked == 0
