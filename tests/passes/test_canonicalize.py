from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import PassError
from passes.canonicalize import Canonicalize
from tests.passes.checking import Checked, check


class Function(nn.Module):
    """A model whose forward is `function`."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def canonical(model: Any, x: Tensor | None = None, **options: Any) -> Checked:
    """Check the canonical form of a module, or of a function of one tensor."""
    if not isinstance(model, nn.Module):
        function = model
        model = Function(lambda _, x: function(x))
    return check(Canonicalize(), model, torch.randn(2, 4, 6, 6) if x is None else x, **options)


def written_in_place(build: Callable[[fx.Graph, fx.Node], Any]) -> fx.GraphModule:
    """A graph of what torch.fx does not record by itself: the writes of fxquant's tracer."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(nn.Module(), graph)


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


# -- layers as functions ---------------------------------------------------------------------


def test_functional_convolution_is_a_module() -> None:
    conv = nn.Conv2d(4, 6, 3)
    model = Function(
        lambda self, x: F.conv2d(x, self.weight, self.bias, stride=2, padding=(1, 0)),
        weight=conv.weight,
        bias=conv.bias,
    )
    found = canonical(model)
    assert found.operations == {"conv2d": 1}
    module: Any = found.graph_module.get_submodule("conv2d")
    assert module.stride == (2, 2)
    assert module.padding == (1, 0)
    assert module.weight is conv.weight


def test_functional_layer_takes_the_path_that_its_weights_had() -> None:
    block = nn.Module()
    block.weight = nn.Parameter(torch.randn(3, 6))  # type: ignore[assignment]
    model = Function(lambda self, x: F.linear(x, self.block.weight), block=block)
    (linear,) = canonical(model).nodes("linear")
    assert linear.target == linear.meta["module_path"] == "block"


def test_weights_used_twice_make_two_modules() -> None:
    weight = nn.Parameter(torch.randn(6, 6))
    model = Function(lambda s, x: F.linear(F.linear(x, s.weight), s.weight), weight=weight)
    first, second = canonical(model).nodes("linear")
    assert first.target != second.target


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        (nn.BatchNorm2d(4), lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight, m.bias)),
        (nn.LayerNorm(6), lambda m, x: F.layer_norm(x, (6,), m.weight, m.bias)),
        (nn.GroupNorm(2, 4), lambda m, x: F.group_norm(x, 2, m.weight, m.bias)),
        (
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, groups=2),
        ),
    ],
)
def test_functional_layer_is_a_module(layer: Any, call: Any) -> None:
    parts = {"weight": layer.weight, "bias": layer.bias}
    parts |= {"mean": nn.Parameter(torch.randn(4)), "var": nn.Parameter(torch.rand(4) + 1)}
    found = canonical(Function(call, **parts))
    assert found.operations == {type(layer).__name__.lower(): 1}


def test_declines_computed_weights() -> None:
    model = Function(
        lambda s, x: F.linear(x, s.weight.abs()), weight=nn.Parameter(torch.ones(3, 6))
    )
    assert canonical(model).reasons == ("its weight is computed while the model runs",)


# -- composites ------------------------------------------------------------------------------


def test_recognizes_channel_shuffle() -> None:
    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous()
        return x.view(n, -1, h, w)

    canonical(
        shuffle,
        expect="""
            x      = input                          f32[2,4,6,6]
            view_1 = channel_shuffle(x, groups=2)   f32[2,4,6,6]
            return view_1""",
    )


def test_leaves_what_only_resembles_a_channel_shuffle() -> None:
    found = canonical(lambda x: x.view(2, 2, 2, 6, 6).transpose(2, 3).reshape(2, 4, 6, 6))
    assert "channel_shuffle" not in found.operations


@pytest.mark.parametrize(
    ("spelled", "operation"),
    [
        (lambda x: F.relu6(x + 3) / 6, "hardsigmoid"),
        (lambda x: x * F.relu6(x + 3.0) / 6.0, "hardswish"),
        (lambda x: x * (F.hardtanh(3 + x, 0, 6) * (1 / 6)), "hardswish"),
        (lambda x: torch.sigmoid(x) * x, "silu"),
    ],
)
def test_recognizes_gates(spelled: Any, operation: str) -> None:
    assert canonical(spelled).operations == {operation: 1}


def test_leaves_gates_of_other_values() -> None:
    assert "silu" not in canonical(lambda x: x * torch.sigmoid(x + 1)).operations


# -- writes in place -------------------------------------------------------------------------


def test_later_readers_see_what_was_written() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        F.relu(y, inplace=True)
        return y + 1

    canonical(
        forward,
        expect="""
            x    = input                    f32[2,4,6,6]
            mul  = mul(x, 2)                f32[2,4,6,6]
            relu = relu(mul, inplace=False) f32[2,4,6,6]
            add  = add(relu, 1)             f32[2,4,6,6]
            return add""",
    )


def test_earlier_readers_see_what_was_there() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        early = y.sum()
        return y.relu_() + early

    canonical(forward)


def test_a_view_sees_a_write_into_its_source() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        flat = y.view(2, -1)
        y.relu_()
        return flat

    assert canonical(forward).operations == {"mul": 1, "relu": 1, "reshape": 1}


def test_the_source_sees_a_write_into_a_view() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].relu_()
        y.flatten(1).mul_(3)
        return y

    canonical(forward)


def test_a_write_through_identity_and_dropout_is_seen() -> None:
    model = Function(
        lambda s, x: (s.relu(s.drop(y := x * 2)), y),
        relu=nn.ReLU(inplace=True),
        drop=nn.Dropout(),
    )
    canonical(model)


def test_pieces_of_a_split_do_not_touch_each_other() -> None:
    def forward(x: Tensor) -> Tensor:
        a, b = (x * 2).chunk(2, 1)
        return torch.cat([a.relu_(), b], 1)

    canonical(forward)


def test_refuses_a_write_that_it_cannot_follow() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y.transpose(1, 2).relu_()
        return y

    with pytest.raises(PassError, match=r"transpose.* is written in place .*view of mul"):
        canonical(forward)


def test_item_assignment_is_a_new_value() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        y = graph.call_function(torch.mul, (x, 2))
        graph.call_function(operator.setitem, (y, (slice(None), 0), 1.0))
        return y

    assert canonical(written_in_place(build)).operations == {"mul": 1, "with_item": 1}


def test_augmented_addition_is_a_write() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        y = graph.call_function(torch.mul, (x, 2))
        z = graph.call_function(operator.iadd, (y, x))
        return y, z

    assert canonical(written_in_place(build)).operations == {"mul": 1, "add": 1}


def test_augmented_addition_of_sizes_is_none() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        n = graph.call_method("size", (x, 0))
        m = graph.call_function(operator.iadd, (n, 1))
        return graph.call_method("new_zeros", (x, (n, m)))

    canonical(written_in_place(build))
