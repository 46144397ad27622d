"""The x86 graph: which kernels it calls, and that they give the reference's integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.backends import check_operations
from fxquant.compiled import CompiledModel
from tests.fxquant.small_networks import Residual, compiled, conv_net, images, module


def kernels(q: CompiledModel) -> list[str]:
    nodes = [n for n in q.stages["x86"].graph.nodes if n.op in ("call_function", "call_method")]
    return [n.target if isinstance(n.target, str) else _name(n.target) for n in nodes]


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    return str(target.__name__)


def checked(
    model: nn.Module, changes: dict[str, Any] | None = None, x: Any = None
) -> CompiledModel:
    """Compiled, and every operation within one step of the reference on four other images."""
    x = images() if x is None else x
    q = compiled(model, changes, calibration=x)
    found = check_operations(q.stages["integer"], q.stages["x86"], (x.flip(0),))
    assert found.largest <= 1
    assert not any("steps off" in note for note in q.report.target_notes)
    return q


def test_a_network_is_direct_calls_of_kernels() -> None:
    names = kernels(checked(Residual(), {"fusion": "all"}))
    assert names[0] == "quantize_per_tensor"
    assert sum("conv2d" in name or "conv_add" in name for name in names) == 3
    assert not any(name.startswith("fxquant::") for name in names)
    assert "dequantize" not in names[:-1]


def test_weights_are_packed_once() -> None:
    graph = checked(conv_net()).stages["x86"]
    packed = [n for n in graph.graph.nodes if n.op == "get_attr" and n.name.endswith("packed")]
    assert len(packed) == 1


def test_relu_needs_no_call_where_codes_start_at_zero() -> None:
    names = kernels(checked(conv_net(), {"quantize_output": True}))
    assert names == ["quantize_per_tensor", "quantized::conv2d", "dequantize"]


def test_relu6_is_a_clamp_only_where_codes_reach_beyond_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1)).eval()
    assert "clamp" not in kernels(checked(model, {"activations.observer": "min_max"}))


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_are_clamped_in_8_bit_containers(bits: int) -> None:
    q = checked(Residual(), {"activations.bits": bits})
    assert "clamp" in kernels(q)
    seen: list[int] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.is_quantized and "clamp" in str(n.target):
                seen.append(int(result.int_repr().max()))
            return result

    with torch.no_grad():
        Watch(q.stages["x86"]).run(images())
    assert max(seen) <= 2**bits - 1


def test_16_bits_run_on_the_reference_operators() -> None:
    changes = {"activations.bits": 16, "activations.scheme": "symmetric", "input_bits": 16}
    q = checked(conv_net(), changes)
    assert any(name.startswith("fxquant::") for name in kernels(q))
    assert any("has no kernel for" in note for note in q.report.target_notes)


@pytest.mark.parametrize(
    "function",
    [F.hardswish, torch.sigmoid, F.silu, torch.tanh, F.gelu, F.hardsigmoid, F.leaky_relu, F.elu],
)
def test_functions_of_one_value(function: Any) -> None:
    model = module(lambda self, x: self.b(function(self.a(x))), a=nn.Conv2d(3, 4, 1),
                   b=nn.Conv2d(4, 2, 1))  # fmt: skip
    checked(model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": 3, "groups": 6, "padding": 1},
        {"kernel_size": (1, 5), "padding": (0, 2)},
    ],
)
def test_convolutions(options: dict[str, Any], scheme: str, bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, bias=bias, **options), nn.ReLU())
    checked(model.eval(), {"weights.scheme": scheme, "quantize_output": True})


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 17])
def test_odd_channel_counts(channels: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, 5, 3)).eval()
    checked(model)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_linear_layers_of_any_rank(rank: int, scheme: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(4, *[3] * (rank - 2), 6)
    checked(model, {"weights.scheme": scheme}, x)


@pytest.mark.parametrize("last", ["convolution", "linear"])
def test_accumulators_leave_as_float(last: str) -> None:
    if last == "linear":
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 5)).eval()
    else:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)).eval()
    q = checked(model)
    assert "dequantize" not in kernels(q)
    expected = q.to_target("reference")(images())
    # The kernel rounds s_x · s_w · a once more or less than the reference does.
    assert torch.allclose(q(images()), expected, rtol=3 * 2.0**-23, atol=1e-6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("later", ["nothing", "the input", "a view"])
def test_convolution_with_residual(relu: bool, later: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        y = self.conv(self.first(x)) + x
        y = self.last(F.relu(y) if relu else y - 1.0)
        if later == "the input":
            return y, self.last(x)
        return (y, self.last(x.transpose(2, 3))) if later == "a view" else y

    model = module(
        forward,
        stem=nn.Conv2d(3, 8, 1),
        first=nn.Conv2d(8, 8, 1),
        conv=nn.Conv2d(8, 8, 3, padding=1),
        last=nn.Conv2d(8, 8, 1),
    )
    q = checked(model)
    names = kernels(q)
    # A grid that starts at zero is its own ReLU.
    assert "conv_add" in names
    assert ("clone" in names) == (later != "nothing")


def test_concatenation_chunks_and_shuffles_stay_quantized() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        y = torch.cat([a, self.second(b)], 1)
        return self.last(F.channel_shuffle(y, 2))

    model = module(forward, first=nn.Conv2d(3, 8, 1), second=nn.Conv2d(4, 4, 1),
                   last=nn.Conv2d(8, 2, 1))  # fmt: skip
    names = kernels(checked(model))
    assert "int_repr" not in names
    assert "dequantize" not in names


def test_squeeze_and_excitation() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.last(x * scale)

    model = module(forward, stem=nn.Conv2d(3, 8, 1), down=nn.Conv2d(8, 2, 1),
                   up=nn.Conv2d(2, 8, 1), last=nn.Conv2d(8, 2, 1))  # fmt: skip
    assert "quantized::mul" in kernels(checked(model))


def test_padding_and_rolling_move_plain_integers() -> None:
    model = module(lambda self, x: self.b(torch.roll(F.pad(self.a(x), (1, 1)), 1, 3)),
                   a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))  # fmt: skip
    checked(model)


def test_channels_last_and_contiguous_inputs_agree() -> None:
    q = checked(Residual())
    channels_last = images().contiguous(memory_format=torch.channels_last)
    assert torch.equal(q(images()), q(channels_last))


def test_the_engine_is_left_as_it_was() -> None:
    before = torch.backends.quantized.engine
    checked(Residual())(images())
    assert torch.backends.quantized.engine == before


def test_runs_in_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    q = checked(Residual())
    expected = q(images())
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: q(images()), range(16)))
    assert all(torch.equal(result, expected) for result in results)
