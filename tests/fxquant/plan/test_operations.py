"""The catalogue of operations: what it refuses is refused before any work is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import CompileError
from fxquant.plan.operations import OPERATIONS, Kind
from fxquant.plan.plan import Plan
from fxquant.recipe import Recipe
from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.to_integer.dyadic import DYADIC_EMITTERS
from fxquant.to_integer.operations import EMITTERS
from tests.fxquant.plan.test_plan import conv, planned
from tests.fxquant.small_networks import images, module

WITHOUT_EMITTER = (
    Kind.FLOAT,
    Kind.SOFTMAX,
    Kind.NORM,
    Kind.NORMALIZE,
    Kind.SELECT,
    Kind.MOVE,
    Kind.SHAPE,
)
"""These compute by their integer form, or are called on the integers as they are."""

REFUSED: list[tuple[Callable[[Any, Tensor], Tensor], str]] = [
    (lambda self, x: F.adaptive_avg_pool2d(x, (None, 2)), "an output size of None"),
    (lambda self, x: F.normalize(x, p=1.0, dim=-1), "division by the 1.0-norm"),
    (lambda self, x: self.up(x, output_size=[16, 16]), "an output size that the call gives"),
    (lambda self, x: F.interpolate(x, scale_factor=2, mode="bilinear"), "bilinear interpolation"),
]
REFUSED_ALONE: list[tuple[Callable[[Any, Tensor], Tensor], str]] = [
    (lambda self, x: self.up(x), "a transposed convolution"),
    (lambda self, x: self.norm(F.relu(x) + x), "a batch norm by itself"),
    (lambda self, x: F.adaptive_avg_pool2d(x, 3), "an average over windows of several sizes"),
    (lambda self, x: F.avg_pool2d(x, x.size(3)), "whose size is known when the model runs"),
    (lambda self, x: F.avg_pool2d(x, 3, ceil_mode=True), "with ceil_mode"),
    (lambda self, x: F.avg_pool2d(x, 3, divisor_override=2), "divisor_override"),
    (lambda self, x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False), "its padding"),
]


def between(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Two convolutions with an operation between them."""
    return module(
        lambda self, x: self.last(forward(self, self.first(x))),
        first=conv(),
        last=conv(4),
        up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(4),
    )


def reasons(plan: Plan) -> str:
    return "; ".join(plan.reasons.values())


@pytest.mark.parametrize(("forward", "reason"), REFUSED)
def test_what_has_no_integer_form_stays_float_with_a_reason(forward: Any, reason: str) -> None:
    model, x = between(forward), images(2)
    compiled = fxquant.compile(model, "w8a8", calibration=x, target="reference")
    assert reason in "; ".join(row.reason for row in compiled.report.coverage)
    assert compiled(x).shape == model(x).shape


@pytest.mark.parametrize(("forward", "reason"), REFUSED_ALONE)
def test_the_plan_knows_what_integers_alone_cannot_do(forward: Any, reason: str) -> None:
    assert reason not in reasons(planned(between(forward)))
    with pytest.raises(CompileError, match=reason):
        planned(between(forward), {"requantization": "dyadic"})


def test_functions_of_16_bits_have_no_table_on_integers_alone() -> None:
    changes = {"activations.bits": 16, "activations.scheme": "symmetric"}
    model = between(lambda self, x: F.silu(x))
    assert not planned(model, changes).reasons
    with pytest.raises(CompileError, match=r"silu \(it takes 8-bit values only"):
        planned(model, {**changes, "requantization": "dyadic"})


def test_a_refusal_comes_before_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    def observe(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a quantizer was made before the plan was checked")

    monkeypatch.setattr(ActivationQuantizer, "__init__", observe)
    recipe = Recipe.named("w8a8").replace({"requantization": "dyadic"})
    with pytest.raises(CompileError, match="a transposed convolution"):
        fxquant.compile(between(lambda self, x: self.up(x)), recipe, calibration=images(2))


def test_behind_the_last_integers_it_stays_float() -> None:
    model = module(
        lambda self, x: self.up(self.first(x)), first=conv(), up=nn.ConvTranspose2d(4, 2, 2)
    )
    plan = planned(model, {"requantization": "dyadic"})
    assert plan.reasons == {"up": "a transposed convolution has no form on integers alone"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: getattr(o, "__name__", str(o)))
def test_every_operation_is_emitted_or_refused(operation: Any) -> None:
    row = OPERATIONS[operation]
    if row.kind is Kind.FLOAT:
        assert row.refuse(torch.fx.Graph().placeholder("x"), None)
    if row.kind in WITHOUT_EMITTER:
        return
    assert row.kind in EMITTERS or operation in EMITTERS
    if row.kind not in DYADIC_EMITTERS and operation not in DYADIC_EMITTERS:
        anything: Any = torch.fx.Graph().placeholder("x")
        assert row.alone(anything, None)
