from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from passes.canonical.plain_values import PlainValues
from passes.infra.verify import run_and_annotate
from tests.passes.checking import float_graph
from tests.passes.models import image, make


def known(forward: Any, **modules: nn.Module) -> tuple[PlainValues, dict[str, Any]]:
    graph_module = float_graph(make(forward, **modules))
    run_and_annotate(graph_module, (image(),), name="probe")
    return PlainValues(graph_module), {node.name: node for node in graph_module.graph.nodes}


def test_a_width_is_known_and_a_batch_size_is_not() -> None:
    plain, nodes = known(lambda self, x: F.relu(x).view(x.size(0), x.size(1), -1))
    assert plain.get(nodes["size"]) is None
    assert plain.get(nodes["size_1"]) == 3
    assert plain.get(nodes["relu"]) is None


def test_no_layer_runs_behind_the_last_question() -> None:
    plain, nodes = known(lambda self, x: self.relu(x * x.size(1)), relu=nn.ReLU())
    plain.graph_module.relu.register_forward_hook(  # type: ignore[union-attr,operator]
        lambda *arguments: pytest.fail("relu ran")
    )
    assert plain.get(nodes["size"]) == 3


def test_a_graph_that_reads_contents_is_known_up_to_there() -> None:
    plain, nodes = known(lambda self, x: (x.size(1), x.max().item(), x.size(2)))
    assert plain.get(nodes["size"]) == 3
    assert plain.get(nodes["item"]) is None
    assert plain.get(nodes["size_1"]) is None


def test_the_graph_is_known_as_it_was_at_the_first_question() -> None:
    plain, nodes = known(lambda self, x: F.relu(x * x.size(1)) * x.size(2))
    assert plain.get(nodes["size"]) == 3
    nodes["relu"].replace_all_uses_with(nodes["mul"])
    nodes["relu"].graph.erase_node(nodes["relu"])
    assert plain.get(nodes["size_1"]) == 8
