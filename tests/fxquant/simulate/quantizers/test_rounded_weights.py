"""Weights whose codes were chosen by something better than nearest rounding."""

from __future__ import annotations

import pytest
import torch

from fxquant.simulate.quantizers import RoundedWeightQuantizer
from fxquant.spec import QParams

GRID = QParams(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), -7, 7, torch.int8)


def test_forward_gives_the_values_of_the_codes_whatever_the_weight_is() -> None:
    quantizer = RoundedWeightQuantizer(GRID, torch.tensor([[1, -3]], dtype=torch.int8))
    weight = torch.tensor([[0.1, 0.2]])
    assert torch.equal(quantizer(weight), torch.tensor([[0.5, -1.5]]))
    assert torch.equal(quantizer.quantize(weight), torch.tensor([[1, -3]], dtype=torch.int8))


def test_gradient_passes_to_the_weight() -> None:
    quantizer = RoundedWeightQuantizer(GRID, torch.tensor([2], dtype=torch.int8))
    weight = torch.tensor([0.1], requires_grad=True)
    quantizer(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(1))


def test_codes_outside_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="leave the grid"):
        RoundedWeightQuantizer(GRID, torch.tensor([9], dtype=torch.int8))


def test_state_holds_the_codes() -> None:
    codes = torch.tensor([3, -7], dtype=torch.int8)
    state = RoundedWeightQuantizer(GRID, codes).state_dict()
    other = RoundedWeightQuantizer(GRID, torch.zeros(2, dtype=torch.int8))
    other.load_state_dict(state)
    assert torch.equal(other.codes, codes)
