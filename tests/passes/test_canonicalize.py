from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.canonicalize import Canonicalize
from tests.passes.checking import Checked, Function, check


def canonical(model: Any, x: Tensor | None = None, **options: Any) -> Checked:
    """Check the canonical form of a module, or of a function of one tensor."""
    if not isinstance(model, nn.Module):
        function = model
        model = Function(lambda _, x: function(x))
    return check(Canonicalize(), model, torch.randn(2, 4, 6, 6) if x is None else x, **options)


RELUS = {
    "module": nn.Sequential(nn.ReLU()),
    "module in place": nn.Sequential(nn.ReLU(inplace=True)),
    "function": F.relu,
    "function in place": lambda x: F.relu(x, inplace=True),
    "underscore function": F.relu_,
    "torch alias": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "clamp from below": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "threshold": lambda x: F.threshold(x, 0, 0),
}


@pytest.mark.parametrize("spelling", RELUS)
def test_relu_has_one_spelling(spelling: str) -> None:
    found = canonical(RELUS[spelling])
    (relu,) = found.nodes("relu")
    assert relu.target is F.relu
    assert relu.kwargs == {"inplace": False}
    assert found.operations == {"relu": 1}


@pytest.mark.parametrize(
    "spelling",
    [
        nn.Sequential(nn.ReLU6()),
        nn.Sequential(nn.Hardtanh(0, 6)),
        lambda x: F.hardtanh(x, 0.0, 6.0),
        lambda x: torch.clamp(x, 0, 6),
        lambda x: x.clamp_(0, 6),
        lambda x: x.clip(min=0, max=6),
    ],
)
def test_relu6_has_one_spelling(spelling: Any) -> None:
    assert canonical(spelling).operations == {"relu6": 1}


@pytest.mark.parametrize(
    ("spelling", "function", "kwargs"),
    [
        (nn.Sigmoid(), torch.sigmoid, {}),
        (F.sigmoid, torch.sigmoid, {}),
        (nn.Hardswish(inplace=True), F.hardswish, {"inplace": False}),
        (nn.GELU(approximate="tanh"), F.gelu, {"approximate": "tanh"}),
        (F.gelu, F.gelu, {"approximate": "none"}),
        (nn.LeakyReLU(0.2), F.leaky_relu, {"negative_slope": 0.2, "inplace": False}),
        (lambda x: F.leaky_relu_(x, 0.2), F.leaky_relu, {"negative_slope": 0.2, "inplace": False}),
        (nn.Softmax(dim=1), F.softmax, {"dim": 1}),
        (lambda x: torch.softmax(x, -1), F.softmax, {"dim": -1}),
        (lambda x: x.softmax(dim=1), F.softmax, {"dim": 1}),
        (lambda x: F.softmax(x, 1), F.softmax, {"dim": 1}),
        (lambda x: x.flatten(1), torch.flatten, {"start_dim": 1, "end_dim": -1}),
        (nn.Flatten(), torch.flatten, {"start_dim": 1, "end_dim": -1}),
        (lambda x: x.mean([2, 3]), torch.mean, {"dim": (2, 3), "keepdim": False}),
        (lambda x: x.mean(3, True), torch.mean, {"dim": (3,), "keepdim": True}),
        (lambda x: torch.mean(x), torch.mean, {"dim": None, "keepdim": False}),
        (nn.AdaptiveAvgPool2d(1), F.adaptive_avg_pool2d, {"output_size": (1, 1)}),
        (nn.AdaptiveAvgPool2d((1, None)), F.adaptive_avg_pool2d, {"output_size": (1, None)}),
        (lambda x: x.permute(0, 2, 3, 1), torch.permute, {"dims": (0, 2, 3, 1)}),
        (lambda x: x.permute([0, 2, 3, 1]), torch.permute, {"dims": (0, 2, 3, 1)}),
        (lambda x: x.transpose(1, 2), torch.transpose, {"dim0": 1, "dim1": 2}),
        (lambda x: torch.swapaxes(x, 1, 2), torch.transpose, {"dim0": 1, "dim1": 2}),
        (lambda x: x.unsqueeze(-1), torch.unsqueeze, {"dim": -1}),
        (lambda x: x.squeeze(), torch.squeeze, {}),
        (lambda x: x.reshape(-1, 6), torch.reshape, {"shape": (-1, 6)}),
        (lambda x: x.view((2, 144)), torch.reshape, {"shape": (2, 144)}),
        (lambda x: torch.reshape(x, [2, -1]), torch.reshape, {"shape": (2, -1)}),
        (lambda x: F.pad(x, [1, 2]), F.pad, {"pad": (1, 2), "mode": "constant", "value": 0.0}),
        (
            nn.ZeroPad2d(1),
            F.pad,
            {"pad": (1, 1, 1, 1), "mode": "constant", "value": 0.0},
        ),
        (
            nn.ReflectionPad2d((1, 0, 0, 1)),
            F.pad,
            {"pad": (1, 0, 0, 1), "mode": "reflect", "value": None},
        ),
        (nn.ChannelShuffle(2), F.channel_shuffle, {"groups": 2}),
        (nn.PixelShuffle(2), F.pixel_shuffle, {"upscale_factor": 2}),
        (lambda x: torch.roll(x, (1, 1), (2, 3)), torch.roll, {"shifts": (1, 1), "dims": (2, 3)}),
        (lambda x: x.clamp(-1, 1), torch.clamp, {"min": -1, "max": 1}),
        (lambda x: x.max(), torch.max, {}),
    ],
)
def test_operation_has_one_spelling(
    spelling: Any, function: Callable[..., Any], kwargs: dict[str, Any]
) -> None:
    model = nn.Sequential(spelling) if isinstance(spelling, nn.Module) else spelling
    node = list(canonical(model).graph_module.graph.nodes)[1]
    assert node.target is function
    assert node.kwargs == kwargs
    assert all(isinstance(operand, fx.Node) for operand in node.args)


@pytest.mark.parametrize(
    "spelling",
    [
        nn.Sequential(nn.MaxPool2d(3, 2, 1)),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: torch.max_pool2d(x, (3, 3), stride=[2], padding=1),
    ],
)
def test_pooling_parameters_are_complete_and_per_axis(spelling: Any) -> None:
    (pool,) = canonical(spelling).nodes("max_pool2d")
    assert pool.kwargs == {
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": (1, 1),
        "dilation": (1, 1),
        "ceil_mode": False,
        "return_indices": False,
    }


def test_pooling_window_may_be_read_from_the_input() -> None:
    canonical(
        lambda x: F.avg_pool2d(x, x.size(3)),
        expect="""
            x          = input                  f32[2,4,6,6]
            size       = .size(x, 3)
            avg_pool2d = avg_pool2d(x, kernel_size=(size, size), stride=(size, size), """
        """padding=(0, 0), ceil_mode=False, count_include_pad=True, divisor_override=None)   """
        """f32[2,4,1,1]
            return avg_pool2d""",
    )
    canonical(lambda x: F.avg_pool2d(x, kernel_size=x.size()[2:]))


@pytest.mark.parametrize(
    ("spelling", "function", "numbers"),
    [
        (lambda x: x + 2, torch.add, (2,)),
        (lambda x: 2 + x, torch.add, (2,)),
        (lambda x: x.add(2), torch.add, (2,)),
        (lambda x: x.add_(2), torch.add, (2,)),
        (lambda x: torch.add(x, other=2), torch.add, (2,)),
        (lambda x: 3 * x, torch.mul, (3,)),
        (lambda x: x / 3, torch.div, (3,)),
        (lambda x: x.true_divide(3), torch.div, (3,)),
        (lambda x: x - 1, torch.sub, (1,)),
        (lambda x: x.abs() ** 2, torch.pow, (2,)),
    ],
)
def test_arithmetic_has_one_spelling(
    spelling: Any, function: Callable[..., Any], numbers: tuple[Any, ...]
) -> None:
    node = list(canonical(spelling).graph_module.graph.nodes)[-2]
    assert node.target is function
    assert node.args[1:] == numbers
    assert node.kwargs == {}


def test_keeps_alpha_of_addition() -> None:
    (add,) = canonical(lambda x: torch.add(x, x.neg(), alpha=2)).nodes("add")
    assert add.kwargs == {"alpha": 2}


def test_keeps_arithmetic_with_sizes() -> None:
    found = canonical(lambda x: x.reshape(x.shape[0] * x.shape[1] + 0, -1))
    assert any(node.target is operator.mul for node in found.graph_module.graph.nodes)


def test_reads_shapes_by_size() -> None:
    canonical(
        lambda x: x.view(x.shape[0], -1),
        expect="""
            x      = input                              f32[2,4,6,6]
            size_1 = .size(x, 0)
            view   = reshape(x, shape=(size_1, -1))     f32[2,144]
            return view""",
    )


def test_rank_is_a_number() -> None:
    found = canonical(lambda x: x.flatten(x.dim() - 1))
    assert not found.nodes(".dim")


def test_view_as_reads_the_size_of_the_other() -> None:
    found = canonical(lambda x: x.flatten(1).view_as(x))
    assert found.operations == {"flatten": 1, ".size": 1, "reshape": 1}


def test_concatenation_and_splitting() -> None:
    found = canonical(lambda x: torch.concat([x.chunk(2, 1)[0], x.split(2, dim=1)[1]], axis=1))
    assert found.nodes("chunk")[0].kwargs == {"chunks": 2, "dim": 1}
    assert found.nodes("split")[0].kwargs == {"split_size_or_sections": 2, "dim": 1}
    assert found.nodes("cat")[0].kwargs == {"dim": 1}


def test_unknown_operations_stay() -> None:
    assert canonical(lambda x: F.normalize(x)).operations == {"normalize": 1}
    assert canonical(lambda x: x.expand(2, 4, 6, 6)).operations == {".expand": 1}


def test_erases_dead_code_and_assertions() -> None:
    def forward(x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 4, "channels")
        x.sigmoid()
        return x.relu()

    assert canonical(forward).operations == {"relu": 1}
