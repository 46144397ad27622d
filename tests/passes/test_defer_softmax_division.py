"""The division of a softmax behind the product that reads it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import DecomposeAttention, DeferSoftmaxDivision, FoldConstants, softmax_numerators
from passes.canonicalize import Canonicalize
from tests.passes.checking import Function, check

FIRST = (Canonicalize(), FoldConstants(), DecomposeAttention())


def scores() -> Tensor:
    return torch.randn(1, 2, 5, 5)


def test_divides_after_the_product() -> None:
    model = Function(lambda self, x: torch.softmax(x, -1) @ x)
    check(
        DeferSoftmaxDivision(),
        model,
        scores(),
        first=FIRST,
        modified=True,
        expect="""
        x       = input                          f32[1,2,5,5]
        softmax = softmax_numerators(x)          f32[1,2,5,5]
        matmul  = weighted_mean(softmax, x)      f32[1,2,5,5]
        return matmul""",
    )


def test_a_mask_stays_with_the_numerators() -> None:
    model = Function(lambda self, x: F.softmax(x.masked_fill(~self.mask, float("-inf")), -1) @ x)
    model.register_buffer("mask", torch.ones(5, 5).tril().bool())
    found = check(DeferSoftmaxDivision(), model, scores(), first=FIRST, modified=True)
    assert found.operations["softmax_numerators"] == 1


def test_probabilities_that_are_read_twice_are_declined() -> None:
    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(x, -1)
        return p @ x, p

    found = check(DeferSoftmaxDivision(), Function(forward), scores(), first=FIRST, modified=False)
    assert found.reasons == ("is read by 2 operations",)


def test_probabilities_as_the_second_operand_are_declined() -> None:
    model = Function(lambda self, x: x @ torch.softmax(x, -1))
    found = check(DeferSoftmaxDivision(), model, scores(), first=FIRST, modified=False)
    assert found.reasons == ("is the second operand of matmul",)


def test_a_softmax_over_another_dim_stays() -> None:
    model = Function(lambda self, x: torch.softmax(x, -2) @ x)
    check(DeferSoftmaxDivision(), model, scores(), first=FIRST, modified=False)


def test_a_softmax_that_no_product_reads_stays() -> None:
    check(
        DeferSoftmaxDivision(),
        Function(lambda self, x: torch.softmax(x, -1)),
        scores(),
        first=FIRST,
        modified=False,
    )


def test_the_largest_numerator_of_a_row_is_one_and_hidden_ones_are_zero() -> None:
    x = torch.randn(3, 7) * 50
    assert torch.equal(softmax_numerators(x).amax(-1), torch.ones(3))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    assert torch.equal(softmax_numerators(x, mask), torch.zeros(3, 7))
