"""Layers whose input is quantized when it is known, and recurrent ones, on native kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.backends.native.lower import lower_to_native
from fxquant.export.whole import whole_program
from passes.infra.verify import flatten, run_and_annotate
from tests.fxquant.backends.integer_graphs import OPS

pytestmark = pytest.mark.usefixtures("native")

# Sigmoid and tanh are within a few units in the last place of torch's, 2^-21 for values of at most
# one; a code of the state moves by a step only next to a tie, which these inputs do not hit.
ROUNDING = 1e-5


@pytest.mark.parametrize("outputs", [1, 16, 37])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x.abs(),
        lambda x: -x.abs(),
        lambda x: x * 1e-5,
        lambda x: x.abs() * 1e-5,
        lambda x: x * 1e-30,
        lambda x: x * 0,
        lambda x: x * 1e30,
        lambda x: x - 2.5,
    ],
)
def test_a_dynamic_linear_layer_is_exact(outputs: int, change: Any) -> None:
    """Whatever the range, and of one batch: samples share a scale."""
    generator = torch.Generator().manual_seed(0)
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer(
        "weight", torch.randint(-127, 128, (outputs, 45), generator=generator).to(torch.int8)
    )
    root.register_buffer("scale", torch.rand(outputs, generator=generator) * 0.01)
    root.register_buffer("bias", torch.randn(outputs, generator=generator))
    constants = [graph.get_attr(name) for name in ("weight", "scale", "bias")]
    x = graph.placeholder("x")
    graph.output((graph.call_function(OPS.linear_dynamic.default, (x, *constants)),))
    module = fx.GraphModule(root, graph)
    sample = torch.randn(4, 3, 45, generator=generator)
    run_and_annotate(module, (sample,), name="graph")
    lowered, called = lower_to_native(module, (sample,), frozenset())
    assert not called
    for batch in (sample, sample[:1], torch.cat([sample, sample * 3])):
        assert torch.equal(module(change(batch))[0], lowered(change(batch))[0])


def native(model: nn.Module, *inputs: Tensor) -> fxquant.CompiledModel:
    q = fxquant.compile(model.eval(), "dynamic_w8a8", calibration=[inputs], target="native")
    assert not any("no kernel" in note for note in q.report.target_notes)
    return q


def test_a_dynamic_network_is_one_program_that_threads_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FXQUANT_NUM_THREADS", "3")
    torch.manual_seed(0)
    q = native(nn.Sequential(nn.Linear(70, 300), nn.ReLU(), nn.Linear(300, 4)), torch.randn(5, 70))
    x = torch.randn(7, 70) * torch.arange(1, 8)[:, None]
    expected = q.to_target("reference")(x)
    assert torch.equal(expected, q(x))
    assert len(whole_program(q.stages["native"], q.example)(x)) == 1


class Recurrent(nn.Module):
    """A recurrent layer and a linear layer behind it."""

    def __init__(self, layer: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 3)

    def forward(self, x: Tensor) -> Any:
        y, state = self.layer(x)
        return self.head(y), state


class FromState(nn.Module):
    """Steps from a state that the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 6), nn.GRU(6, 6)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, state = self.lstm(x, (h, c))
        return self.gru(y, state[0]), state


def check(model: nn.Module, *inputs: Tensor) -> fxquant.CompiledModel:
    q = native(model, *inputs)
    expected, found = q.to_target("reference")(*inputs), q(*inputs)
    assert [path for path, _ in flatten(found)] == [path for path, _ in flatten(expected)]
    for (path, want), (_, got) in zip(flatten(expected), flatten(found), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING, msg=path)
    # What an export writes is one program, with the same outputs in the same order.
    exported = whole_program(q.stages["native"], q.example)(*inputs)
    for (_, want), again in zip(flatten(expected), exported, strict=True):
        assert torch.equal(want, again)
    return q


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bias": False},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True},
    ],
)
def test_recurrent_layers(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(Recurrent(kind(8, 21, **options)), torch.randn(5, 3, 8))


def test_a_given_state() -> None:
    torch.manual_seed(0)
    check(FromState(), torch.randn(5, 3, 8), torch.randn(1, 3, 6), torch.randn(1, 3, 6))


def test_a_sequence_of_another_length() -> None:
    torch.manual_seed(0)
    q = check(Recurrent(nn.LSTM(8, 6)), torch.randn(5, 3, 8))
    x = torch.randn(9, 2, 8)
    for (_, want), (_, got) in zip(
        flatten(q.to_target("reference")(x)), flatten(q(x)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)
