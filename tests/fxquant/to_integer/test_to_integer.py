"""The integer graph: operators, grids, constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.errors import CompileError
from fxquant.to_integer.invariants import check_integer_graph
from tests.fxquant.simulation import Float64Check
from tests.fxquant.small_networks import compiled, conv_net, images, module


def integer_graph(
    model: nn.Module, changes: dict[str, Any] | None = None, calibration: Any = None
) -> fx.GraphModule:
    """The integer graph, checked against float64."""
    q = compiled(model, changes, calibration=calibration, target="reference")
    integer = q.stages["integer"]
    check = Float64Check(integer, q.stages["simulated"])
    with torch.no_grad():
        check.run(*q.example)
    assert max(check.steps.values(), default=0) <= 1
    assert max(check.excess.values(), default=0.0) <= 1
    return integer


def operators(graph_module: fx.GraphModule) -> list[str]:
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    return [str(getattr(node.target, "_opname", node.target.__name__)) for node in nodes]


def arguments(graph_module: fx.GraphModule, operator: str) -> dict[str, Any]:
    for node in graph_module.graph.nodes:
        if getattr(node.target, "_opname", "") == operator:
            names = [argument.name for argument in node.target._schema.arguments]
            return dict(zip(names, node.args, strict=False))
    raise AssertionError(operator)


def test_conv_relu_is_one_operator() -> None:
    integer = integer_graph(conv_net(), {"quantize_output": True})
    assert operators(integer) == ["quantize", "conv", "dequantize"]


def test_relu_is_the_lower_bound_of_the_codes() -> None:
    found = arguments(integer_graph(conv_net(), {"quantize_output": True}), "conv")
    assert (found["zero_point"], found["qmin"], found["qmax"]) == (0, 0, 255)


def test_relu6_is_the_upper_bound_of_the_codes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6()).eval()
    model[0].bias.data += 5.0
    # Observed before ReLU6 alone, the range would be larger.
    found = arguments(integer_graph(model, {"quantize_output": True}), "conv")
    assert found["qmax"] == min(255, round(6.0 / found["scale"]) + found["zero_point"])


def test_weights_and_biases_are_integers() -> None:
    model = conv_net()
    integer = integer_graph(model, {"bias_correction": False})
    weight, scale = integer.get_buffer("0.weight"), integer.get_buffer("0.weight_scale")
    assert (weight.dtype, integer.get_buffer("0.bias").dtype) == (torch.int8, torch.int32)
    real = weight.float() * scale.view(-1, 1, 1, 1)
    assert (real - model[0].weight).abs().max() <= scale.max() * 0.5001
    step = scale.double() * arguments(integer, "conv")["x_scale"]
    bias = integer.get_buffer("0.bias").double() * step
    assert ((bias - model[0].bias.double()).abs() <= step * 0.5001).all()


def test_a_bias_that_dwarfs_its_weights_fits_the_accumulator() -> None:
    model = conv_net()
    model[0].weight.data[0] *= 1e-9
    model[0].bias.data[0] = 3.0
    q = compiled(model, target="reference")
    assert torch.allclose(q(images())[:, 0], torch.tensor(3.0), rtol=0.02)


def test_a_dead_channel_is_its_bias() -> None:
    model = conv_net()
    model[0].weight.data[1] = 0.0
    model[0].bias.data[1] = 0.25
    for target in ("reference", "x86"):
        q = compiled(model, target=target)
        assert torch.allclose(q(images())[:, 1], torch.tensor(0.25), rtol=0.02), target


def test_padding_pads_with_the_zero_point() -> None:
    model = module(lambda self, x: self.conv(F.pad(self.first(x), (1, 2, 0, 1))),
                   first=nn.Conv2d(3, 4, 1), conv=nn.Conv2d(4, 4, 3))  # fmt: skip
    integer = integer_graph(model)
    (pad,) = [node for node in integer.graph.nodes if node.target is F.pad]
    assert pad.kwargs["value"] == pad.meta["grid"].zero_point > 0


def test_a_function_of_one_value_is_a_table() -> None:
    model = module(lambda self, x: self.b(F.silu(self.a(x))), a=nn.Conv2d(3, 4, 1),
                   b=nn.Conv2d(4, 2, 1))  # fmt: skip
    integer = integer_graph(model)
    assert operators(integer) == ["quantize", "conv", "lookup", "conv"]
    assert integer.get_buffer("tables.silu").shape == (256,)


def test_16_bits_have_no_table() -> None:
    model = module(lambda self, x: self.b(F.silu(self.a(x))), a=nn.Conv2d(3, 4, 1),
                   b=nn.Conv2d(4, 2, 1))  # fmt: skip
    changes = {"activations.bits": 16, "activations.scheme": "symmetric", "input_bits": 16}
    assert "lookup" not in operators(integer_graph(model, changes))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.flatten(2).unflatten(2, (8, 8)),
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: x.chunk(2, 1)[1].repeat_interleave(2, 1),
        lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: torch.roll(x, 1, 2),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: x[:, :, ::2, 1:],
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, :4],
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_moves_and_pools(move: Any, bits: int) -> None:
    model = module(lambda self, x: self.b(move(self.a(x))), a=nn.Conv2d(3, 4, 1),
                   b=nn.Conv2d(4, 2, 1))  # fmt: skip
    scheme = "symmetric" if bits == 16 else "affine"
    changes = {"activations.bits": bits, "activations.scheme": scheme, "input_bits": bits}
    integer_graph(model, changes)
    q = compiled(model, changes)
    assert q.report.target_check["largest_difference"] <= 1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("target", ["x86", "reference"])
def test_convolutions_of_every_dimension(dims: int, target: str) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    model = module(lambda self, x: self.b(pool(F.relu(self.a(x)), 2)),
                   a=convolution(3, 4, 3), b=convolution(4, 2, 1, groups=2))  # fmt: skip
    x = torch.randn(2, 3, *[6] * dims)
    q = compiled(model, calibration=x, target=target)
    assert (q(x) - model(x)).abs().max() < 0.1
    assert q.report.int8_share == 1.0
    integer_graph(model, calibration=x)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(scheme: str, groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer).eval()
    integer_graph(model, {"weights.scheme": scheme, "quantize_output": True})


def test_channels_of_a_standalone_batch_norm() -> None:
    model = module(lambda self, x: self.conv(self.norm(F.max_pool2d(self.first(x), 2))),
                   first=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4),
                   conv=nn.Conv2d(4, 2, 1))  # fmt: skip
    model.norm.running_var[0] = 9.0
    assert "channel_affine" in operators(integer_graph(model, {"fusion": "none"}))


def test_same_padding_that_is_symmetric() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2)).eval()
    assert arguments(integer_graph(model), "conv")["padding"] == [2, 2]


def test_every_integer_node_says_what_it_stands_for() -> None:
    q = compiled()
    names = {node.name for node in q.stages["simulated"].graph.nodes}
    for node in q.stages["integer"].graph.nodes:
        if "grid" in node.meta:
            assert node.meta["simulated"] in names
            assert node.meta["module_path"] is not None


def test_a_float_among_integers_is_an_error() -> None:
    integer = integer_graph(conv_net(), {"quantize_output": True})
    for node in integer.graph.nodes:
        if getattr(node.target, "_opname", "") == "quantize":
            node.replace_all_uses_with(node.args[0], lambda user: "grid" in user.meta)
    with pytest.raises(CompileError, match="reads the float value"):
        check_integer_graph(integer)


def test_float_operations_between_integers_are_dequantized_once() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.softmax(y, 1) - F.log_softmax(y, 1))

    model = module(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    names = operators(integer_graph(model))
    assert names.count("quantize") == 2
    assert names.count("dequantize") == 0
