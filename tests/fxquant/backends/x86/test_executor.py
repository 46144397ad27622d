from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.backends.x86 import executor as x86_executor
from fxquant.backends.x86.executor import Executor, with_traced_stretches
from fxquant.backends.x86.kernels import conv_add, onednn
from fxquant.backends.x86.target import X86
from passes.infra.verify import run_and_annotate
from tests.fxquant.backends.integer_graphs import (
    AFFINE,
    CHANNELS,
    ONE_SIDED,
    OPS,
    IntegerGraph,
)
from tests.fxquant.small_networks import Residual, compiled


def lowered(graph: IntegerGraph, *outputs: fx.Node) -> fx.GraphModule:
    module = X86().lower(graph.finish(*outputs), (graph.example,)).graph_module
    run_and_annotate(module, (graph.example,), name="x86 graph")
    return module


def residual_network(seed: int = 0, outputs: int = 1) -> tuple[fx.GraphModule, Tensor]:
    graph = IntegerGraph(seed)
    values = [graph.conv(graph.x, ONE_SIDED, CHANNELS, CHANNELS)]
    for _ in range(3):
        y = graph.conv(values[-1], AFFINE, CHANNELS, CHANNELS, kernel=3)
        y = graph.conv(y, ONE_SIDED, CHANNELS, CHANNELS, relu=True, residual=values[-1])
        values.append(y)
    ends = [
        graph.graph.call_function(OPS.dequantize.default, (y, *ONE_SIDED.input))
        for y in values[-outputs:]
    ]
    return lowered(graph, *ends), graph.example


def calls(graph_module: fx.GraphModule) -> list[str]:
    return [n.op for n in graph_module.graph.nodes if n.op.startswith("call")]


@pytest.mark.parametrize("outputs", [1, 3])
def test_gives_the_values_of_the_graph(outputs: int) -> None:
    graph, x = residual_network(outputs=outputs)
    assert any(node.target is conv_add for node in graph.graph.nodes)
    run = Executor(graph, (x,))
    for batch in (x, x[:1], torch.cat([x, -x, 2 * x])):
        with torch.no_grad():
            expected, found = graph(batch), run(batch)
        assert len(expected) == len(found) == outputs
        for want, got in zip(expected, found, strict=True):
            assert torch.equal(want, got)
    assert run._traced is not None


def test_a_chain_of_kernels_is_one_call() -> None:
    graph, x = residual_network()
    traced = with_traced_stretches(graph, (x,))
    assert traced is not None
    assert calls(traced) == ["call_module", "call_function"]


def test_the_inputs_stay_as_they_are() -> None:
    graph, x = residual_network()
    before = x.clone()
    Executor(graph, (x,))(x)
    assert torch.equal(x, before)


def test_a_call_that_cannot_be_traced_stays_between_two_stretches() -> None:
    graph = IntegerGraph(0)
    y = graph.x
    for _ in range(2):
        for _ in range(4):
            y = graph.conv(y, ONE_SIDED, CHANNELS, CHANNELS)
        y = graph.call(torch.flip, ONE_SIDED, y, dims=[2])
    y = graph.graph.call_function(OPS.dequantize.default, (y, *ONE_SIDED.input))
    plain = lowered(graph, y)
    traced = with_traced_stretches(plain, (graph.example,))
    assert traced is not None
    assert calls(traced).count("call_module") == 2
    assert torch.equal(traced(graph.example)[0], plain(graph.example)[0])


def test_other_shapes_behind_the_batch_run_the_graph() -> None:
    graph, x = residual_network()
    run = Executor(graph, (x,))
    wide = F.pad(x, [0, 3])
    assert torch.equal(run(wide)[0], graph(wide)[0])


def test_a_copy_traces_again() -> None:
    graph, x = residual_network()
    run = Executor(graph, (x,))
    wanted = run(x)[0]
    assert run._traced is not None
    copied = copy.deepcopy(run)
    assert copied._traced is not None
    assert copied._traced is not run._traced
    assert torch.equal(copied(x)[0], wanted)


def test_runs_the_graph_where_tracing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("gone from torch")

    monkeypatch.setattr(x86_executor, "_trace", fails)
    graph, x = residual_network()
    run = Executor(graph, (x,))
    assert torch.equal(run(x)[0], graph(x)[0])
    assert run._traced is None
    (note,) = run.notes
    assert note.endswith("from Python, which is slower: RuntimeError: gone from torch")


def test_runs_the_graph_where_the_traced_values_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    real = x86_executor._trace

    def wrong(module: fx.GraphModule, example: tuple[Any, ...]) -> Any:
        traced = real(module, example)

        class Off(nn.Module):
            def forward(self, *inputs: Tensor) -> Any:
                return tuple(value + 1 for value in traced(*inputs))

        return Off()

    monkeypatch.setattr(x86_executor, "_trace", wrong)
    graph, x = residual_network()
    run = Executor(graph, (x,))
    assert torch.equal(run(x)[0], graph(x)[0])
    assert run._traced is None
    assert "what torch traced gives other values" in run.notes[0]


def test_the_report_says_that_nothing_is_traced_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("gone from torch")

    assert compiled(Residual()).report.target_notes == ()
    monkeypatch.setattr(x86_executor, "_trace", fails)
    assert "slower: RuntimeError: gone from torch" in str(compiled(Residual()).report)


def test_the_engine_is_what_it_was_afterwards() -> None:
    engine = torch.backends.quantized.engine
    graph, x = residual_network()
    run = Executor(graph, (x,))
    wanted = run(x)[0]
    assert run._traced is not None
    found: list[Tensor] = []

    def many() -> None:
        with torch.no_grad():
            found.extend(run(x)[0] for _ in range(20))

    threads = [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(torch.equal(value, wanted) for value in found)
    assert torch.backends.quantized.engine == engine


def test_the_engine_stays_set_while_anyone_is_inside() -> None:
    engine = torch.backends.quantized.engine
    with onednn:
        with onednn:
            pass
        assert torch.backends.quantized.engine == "onednn"
    assert torch.backends.quantized.engine == engine
