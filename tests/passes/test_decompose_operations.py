from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import Canonicalize, FoldConstants
from passes.decompose_operations import DecomposeOperations
from tests.passes.checking import Checked, Function, check

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def decomposed(forward: Callable[..., Any], x: Tensor = X, **parts: nn.Module) -> Checked:
    model = Function(forward, **parts)
    return check(DecomposeOperations(), model, x, first=[Canonicalize(), FoldConstants()])


def test_writes_a_difference_as_a_sum() -> None:
    check(
        DecomposeOperations(),
        Function(lambda s, x: torch.relu(x) - torch.sigmoid(x)),
        X,
        first=[Canonicalize()],
        expect="""
            x       = input                       f32[2,4,6,6]
            relu    = relu(x, inplace=False)      f32[2,4,6,6]
            sigmoid = sigmoid(x)                  f32[2,4,6,6]
            neg     = neg(sigmoid)                f32[2,4,6,6]
            sub     = add(relu, neg)              f32[2,4,6,6]
            return sub""",
    )


def test_leaves_a_difference_to_the_mean() -> None:
    found = decomposed(lambda s, x: x - x.mean(1, keepdim=True))
    assert found.reasons == ("it takes a mean out of what it is the mean of, as a norm does",)


def test_leaves_differences_of_integers() -> None:
    assert "sub" in decomposed(lambda s, x: x.argmax(1) - x.argmin(1)).operations


@pytest.mark.parametrize(
    ("forward", "operations"),
    [
        (lambda s, x: F.glu(x, 1), {"getitem": 2, "sigmoid": 1, "mul": 1}),
        (lambda s, x: F.adaptive_max_pool2d(x, (2, None)), {"max_pool2d": 1}),
    ],
)
def test_writes_operations_by_their_parts(forward: Any, operations: dict[str, int]) -> None:
    assert decomposed(forward).operations == operations


def test_a_prelu_of_one_slope_is_a_leaky_relu() -> None:
    layers = {"act": nn.PReLU(init=0.1)}
    assert decomposed(lambda s, x: s.act(x), **layers).operations == {"leaky_relu": 1}


def test_a_prelu_with_a_slope_a_channel_scales_what_is_below_zero() -> None:
    act = nn.PReLU(4)
    act.weight = nn.Parameter(torch.tensor([0.1, 0.5, -0.2, 1.5]))
    found = decomposed(lambda s, x: s.act(x), act=act)
    assert found.operations == {"relu": 1, "clamp": 1, "batchnorm2d": 1, "add": 1}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_by_what_is_there_comes_before_its_convolution(mode: str) -> None:
    conv = nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode)
    found = decomposed(lambda s, x: s.conv(x), conv=conv)
    assert found.operations == {"pad": 1, "conv2d": 1}
    assert found.graph_module.conv.weight is conv.weight
    assert conv.padding_mode == mode


def test_a_product_with_a_stored_matrix_is_a_linear_layer() -> None:
    layer = nn.Linear(6, 5)
    found = decomposed(lambda s, x: torch.addmm(s.l.bias, x, s.l.weight.t()), X[0, 0], l=layer)
    assert found.operations == {"linear": 1}
    assert found.nodes("linear")


def test_a_product_of_two_values_is_a_product_and_a_sum() -> None:
    found = decomposed(lambda s, x: torch.addmm(x, torch.relu(x), x), X[0, 0])
    assert found.operations == {"relu": 1, "matmul": 1, "add": 1}


def test_windows_of_several_sizes_stay() -> None:
    found = decomposed(lambda s, x: F.adaptive_max_pool2d(x, 4))
    assert found.reasons == ("its windows are of several sizes",)
