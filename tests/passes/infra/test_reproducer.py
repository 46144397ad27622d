"""A failed pass leaves the graph before it, which fails the same way when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import Canonicalize, Pass, PassError, PassResult, Pipeline, Rewriter, VerificationError
from passes.infra.listing import to_text
from passes.infra.reproducer import load_reproducer, write_reproducer
from tests.passes.checking import float_graph
from tests.passes.models import image, make


class DropRelu(Pass):
    """Says that it is exact."""

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        rewriter = Rewriter(graph_module)
        for node in graph_module.graph.find_nodes(op="call_function", target=F.relu):
            rewriter.absorb(node, node.all_input_nodes[0])
        return PassResult(rewriter.finish())


class Broken(Pass):
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        raise KeyError("conv9")


def network() -> fx.GraphModule:
    def forward(self: Any, x: Any) -> Any:
        y = F.max_pool2d(F.relu(self.conv(x)), 2)
        return (y + self.shift)[:, 1:, : y.size(2)]

    torch.manual_seed(0)
    return float_graph(make(forward, conv=nn.Conv2d(3, 4, 1), shift=torch.ones(1)))


def failed(folder: Path, *steps: Pass, graph_module: fx.GraphModule | None = None) -> PassError:
    with pytest.raises(PassError) as caught:
        Pipeline(steps).run(graph_module or network(), (image(),))
    write_reproducer(folder, caught.value)
    return caught.value


def test_the_loaded_graph_fails_the_same_way(tmp_path: Path) -> None:
    error = failed(tmp_path / "new", Canonicalize(), DropRelu())
    graph_module, probe = load_reproducer(tmp_path / "new")
    with pytest.raises(VerificationError) as again:
        Pipeline([DropRelu()]).run(graph_module, probe)
    assert str(again.value) == str(error)


def test_the_loaded_graph_is_the_one_before_the_pass(tmp_path: Path) -> None:
    failed(tmp_path, Canonicalize(), Broken())
    expected = network()
    Pipeline([Canonicalize()]).run(expected, (image(),))
    graph_module, probe = load_reproducer(tmp_path)
    assert to_text(graph_module) == to_text(expected) == (tmp_path / "before.txt").read_text()
    assert torch.equal(graph_module(*probe), expected(*probe))
    for node, other in zip(graph_module.graph.nodes, expected.graph.nodes, strict=True):
        assert node.meta.get("origin") == other.meta.get("origin")


def test_operators_come_back(tmp_path: Path) -> None:
    graph_module = network()
    Pipeline([Canonicalize()]).run(graph_module, (image(),))
    for node in graph_module.graph.find_nodes(op="call_function", target=F.relu):
        node.target, node.kwargs = torch.ops.aten.relu.default, {}
    failed(tmp_path, Broken(), graph_module=graph_module)
    loaded, probe = load_reproducer(tmp_path)
    assert torch.ops.aten.relu.default in {node.target for node in loaded.graph.nodes}
    assert torch.equal(loaded(*probe), network()(*probe))


def test_the_error_names_the_pass_and_says_how_to_run_it_again(tmp_path: Path) -> None:
    failed(tmp_path, Broken())
    text = (tmp_path / "error.txt").read_text()
    assert "KeyError: 'conv9'" in text
    assert "Pipeline([Broken(...)]).run(graph, probe)" in text
    assert torch.__version__ in text


def test_a_graph_that_does_not_pickle_leaves_its_listing(tmp_path: Path) -> None:
    graph_module = network()
    graph_module.conv.function = lambda x: x  # type: ignore[union-attr]
    failed(tmp_path, Broken(), graph_module=graph_module)
    assert {path.name for path in tmp_path.iterdir()} == {"before.txt", "error.txt"}
    assert "cannot be pickled" in (tmp_path / "error.txt").read_text()


def test_a_graph_that_never_ran_is_the_callers_matter() -> None:
    with pytest.raises(VerificationError, match="before the first pass") as caught:
        Pipeline([Broken()]).run(network(), (image()[:, :1],))
    assert caught.value.failure is None
