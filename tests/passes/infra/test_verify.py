from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import TensorInfo, VerificationError
from passes.infra.verify import check_equivalent, check_well_formed, flatten, run_and_annotate
from tests.passes.checking import float_graph
from tests.passes.models import image, make

ONES = torch.ones(4)


def test_annotates_every_tensor_and_returns_the_outputs() -> None:
    graph_module = float_graph(make(lambda self, x: (torch.chunk(x, 3, dim=1), x.size(0))))
    outputs = run_and_annotate(graph_module, (image(),), name="probe")
    x, chunk, size, _ = graph_module.graph.nodes
    assert x.meta["tensor"] == TensorInfo((1, 3, 8, 8), torch.float32)
    assert chunk.meta["tensor"] == (TensorInfo((1, 1, 8, 8), torch.float32),) * 3
    assert "tensor" not in size.meta
    assert outputs[1] == 1


def test_annotating_forgets_what_is_no_tensor_any_more() -> None:
    graph_module = float_graph(make(lambda self, x: x.size(0)))
    (size,) = graph_module.graph.find_nodes(op="call_method", target="size")
    size.meta["tensor"] = TensorInfo((1,), torch.float32)
    run_and_annotate(graph_module, (image(),), name="probe")
    assert "tensor" not in size.meta


def test_annotates_dictionaries() -> None:
    graph_module = float_graph(make(lambda self, x: {"out": F.relu(x)}))
    run_and_annotate(graph_module, (image(),), name="probe")
    found = graph_module.graph.output_node().meta["tensor"]
    assert found == {"out": TensorInfo((1, 3, 8, 8), torch.float32)}


def test_a_failing_node_is_named() -> None:
    graph_module = float_graph(make(lambda self, x: self.conv(F.relu(x)), conv=nn.Conv2d(4, 1, 1)))
    with pytest.raises(
        VerificationError, match=r"^probe: running conv \(conv\) failed: .*channels"
    ):
        run_and_annotate(graph_module, (image(3),), name="probe")


def test_too_few_inputs_are_named() -> None:
    graph_module = float_graph(make(lambda self, x, y: torch.add(x, y)))
    with pytest.raises(VerificationError, match=r"^probe: running y \(root\) failed"):
        run_and_annotate(graph_module, (image(),), name="probe")


def test_a_missing_module_is_named() -> None:
    graph_module = float_graph(make(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 1, 1)))
    del graph_module.conv
    with pytest.raises(VerificationError, match=r"^broken: .*conv"):
        check_well_formed(graph_module, name="broken")


def test_a_value_that_is_read_before_it_is_made_is_found() -> None:
    graph_module = float_graph(make(lambda self, x: torch.exp(F.relu(x))))
    _, relu, exp, _ = graph_module.graph.nodes
    relu.prepend(exp)
    with pytest.raises(VerificationError, match=r"^broken: left a graph that does not lint"):
        check_well_formed(graph_module, name="broken")


def test_rounding_is_equivalent() -> None:
    check_equivalent({"a": (ONES,)}, {"a": (ONES * (1 + 1e-6),)}, name="pass")
    check_equivalent(torch.zeros(3), torch.zeros(3), name="pass")
    check_equivalent((ONES, 3), (ONES, 3), name="pass")


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        (ONES, ONES * 1.001, "pass: is exact but output differs by 1.00e-03 of its norm"),
        (ONES, ONES * math.nan, "pass: is exact but output differs in where it is not"),
        (torch.zeros(4), ONES, "pass: is exact but output differs by inf"),
        ((ONES, ONES), (ONES,), "changed the output structure"),
        ({"a": ONES}, {"b": ONES}, "changed the output structure"),
        (ONES * 1j, ONES * 2j, "pass: is exact but output differs by 1.00e+00"),
        (ONES, torch.ones(2, 2), "changed from torch.float32[4] to torch.float32[2, 2]"),
        (ONES, ONES.double(), "changed from torch.float32[4] to torch.float64[4]"),
        ((ONES, 3), (ONES, 4), "pass: is exact but output[1] changed"),
        ({"a": (ONES,)}, {"a": (ONES * 2,)}, "output['a'][0] differs"),
    ],
)
def test_other_outputs_are_not(expected: Any, found: Any, message: str) -> None:
    with pytest.raises(VerificationError) as raised:
        check_equivalent(expected, found, name="pass")
    assert message in str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_was_not_finite_before_may_stay_so(value: float) -> None:
    expected = torch.tensor([1.0, value])
    check_equivalent(expected, expected.clone(), name="pass")
    check_equivalent(expected, torch.tensor([1.0 + 1e-6, value]), name="pass")
    with pytest.raises(VerificationError, match="differs"):
        check_equivalent(expected, torch.tensor([1.01, value]), name="pass")
    with pytest.raises(VerificationError, match="differs"):
        check_equivalent(expected, torch.tensor([value, 1.0]), name="pass")


def test_flatten_names_the_leaves() -> None:
    found = dict(flatten({"a": (1, [2]), "b": 3}))
    assert found == {"['a'][0]": 1, "['a'][1][0]": 2, "['b']": 3}
