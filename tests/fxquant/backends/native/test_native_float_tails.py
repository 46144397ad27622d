"""What a network computes in float behind its last integers runs natively as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant.backends.native.lower import lower_to_native
from fxquant.export.whole import whole_program
from passes.infra.verify import run_and_annotate

pytestmark = pytest.mark.usefixtures("native")
ROUNDING = 2**-24


def results(function: Any, *, shape: tuple[int, ...] = (2, 37, 9, 7), **kwargs: Any) -> Any:
    """Torch's result, the native one, and the input, of a larger batch than was planned."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(function, (x, *kwargs.pop("args", ())), kwargs),))
    module = fx.GraphModule(nn.Module(), graph)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    run_and_annotate(module, (sample,), name="graph")
    lowered, called = lower_to_native(module, (sample,), frozenset(), without_torch=True)
    assert not called
    more = torch.cat([sample, sample.flip(0) * 2])
    return module(more)[0], lowered(more)[0], more


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (F.relu6, {}),
        (F.hardtanh, {"min_val": -0.5, "max_val": 0.25}),
        (torch.clamp, {"min": -0.5}),
        (torch.clamp, {"max": 0.7, "min": None}),
        (torch.mul, {"args": (0.1,)}),
        (torch.add, {"args": (3,)}),
        (torch.div, {"args": (3.0,)}),
        (F.max_pool2d, {"kernel_size": (3, 2), "stride": (2, 2), "padding": (1, 1)}),
        (
            F.max_pool2d,
            {"kernel_size": (3, 3), "stride": None, "padding": (0, 0), "dilation": (2, 2)},
        ),
    ],
)
def test_one_operation_of_ieee_754_is_torch_s(function: Any, options: dict[str, Any]) -> None:
    expected, found, _ = results(function, **options)
    assert torch.equal(expected, found)


WINDOW = {"kernel_size": (3, 2), "stride": (2, 2), "padding": (1, 1)}


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (F.adaptive_avg_pool2d, {"output_size": (1, 1)}),
        (F.adaptive_avg_pool2d, {"output_size": (4, 3)}),
        (F.avg_pool2d, WINDOW),
        (F.avg_pool2d, {**WINDOW, "count_include_pad": False, "ceil_mode": True}),
        (F.avg_pool2d, {**WINDOW, "divisor_override": 5}),
        (torch.mean, {"dim": (2, 3)}),
        (torch.mean, {"dim": (2, 3), "keepdim": True}),
        (torch.mean, {"dim": 1}),
        (torch.mean, {"dim": -1}),
        (torch.sum, {"dim": (1, 3)}),
    ],
)
def test_a_float_average_is_rounded_once(function: Any, options: dict[str, Any]) -> None:
    """Added in doubles, row by row: within one rounding of the true one, and nearer than torch's.

    Torch adds floats in an order of its own: each of at most n additions is off by half a unit in
    the last place of a sum below the sum of the magnitudes, and the division by one more.
    """
    expected, found, x = results(function, **options)
    assert torch.equal(function(x.double(), **options).float(), found)
    most = 9 * 7 * 37
    magnitude = function(x.abs(), **options)
    assert bool(((expected - found).abs() <= (most + 1) * ROUNDING * magnitude).all())


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_softmax_over_any_dimension(axis: int) -> None:
    expected, found, _ = results(F.softmax, dim=axis)
    # Four units in the last place for each of both.
    assert torch.allclose(expected, found, rtol=8 * 2 * ROUNDING, atol=0)


TAILS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "average": nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "windows": nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)),
}


class Tail(nn.Module):
    """Ends in float, because no quantizer follows."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 8, 3), tail

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.tail(self.conv(x))
        return result


@pytest.mark.parametrize("name", TAILS)
def test_a_float_tail_has_the_reference_s_bits_and_is_one_program_without_torch(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 9, 9)
    q = fxquant.compile(Tail(TAILS[name]).eval(), "w8a8", calibration=x, target="native")
    assert not any("no kernel" in note for note in q.report.target_notes)
    expected = q.to_target("reference")(x)
    assert torch.equal(expected, q(x))
    integer = q.stages["integer"]
    alone, called = lower_to_native(integer, q.example, frozenset(), without_torch=True)
    assert not called
    assert len(whole_program(alone, q.example)(x)) == 1
    # What is averaged is not negative: the bound of the averages is relative to them.
    assert torch.allclose(expected, alone(x), rtol=50 * ROUNDING, atol=0)
    left = [note for note in q.report.target_notes if "of floats to torch" in note]
    assert len(left) == (name in ("average", "windows"))


def test_what_computes_new_elements_is_no_movement() -> None:
    """Bilinear interpolation takes the form of a movement, and is left to torch."""
    graph = fx.Graph()
    call = graph.call_function(
        F.interpolate, (graph.placeholder("x"),), {"size": (9, 9), "mode": "bilinear"}
    )
    graph.output((call,))
    module = fx.GraphModule(nn.Module(), graph)
    sample = torch.randn(1, 2, 4, 4)
    run_and_annotate(module, (sample,), name="graph")
    _, called = lower_to_native(module, (sample,), frozenset())
    assert called == ["interpolate"]
