from __future__ import annotations

import json
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import FusedLayer, TensorInfo
from passes.infra import listing
from tests.passes.checking import float_graph
from tests.passes.models import annotated, image, make


def small() -> fx.GraphModule:
    return annotated(
        make(lambda self, x: F.relu(self.conv(x)) + self.shift, conv=nn.Conv2d(3, 4, 1),
             shift=torch.ones(1)),
        image(),
    )  # fmt: skip


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_text_has_one_line_for_each_node() -> None:
    assert lines(listing.to_text(small())) == [
        "x = input f32[1,3,8,8]",
        "conv = conv2d(x) f32[1,4,8,8]",
        "relu = relu(conv, inplace=False) f32[1,4,8,8]",
        "shift = constant(shift) f32[1]",
        "add = add(relu, shift) f32[1,4,8,8]",
        "return add",
    ]


def test_text_aligns_shapes() -> None:
    columns = {line.index("f32[") for line in listing.to_text(small()).splitlines()[:-1]}
    assert len(columns) == 1


def test_text_is_the_same_every_time() -> None:
    assert listing.to_text(small()) == listing.to_text(small())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1,), "(1,)"),
        ((1, 2.5), "(1, 2.5)"),
        ([1, None], "[1, None]"),
        ({"a": True}, "{a: True}"),
        (slice(None, 3), ":3"),
        (slice(1, None, 2), "1::2"),
        (0.1 + 0.2, "0.3"),
        (torch.uint8, "u8"),
        (torch.complex64, "torch.complex64"),
        (..., "..."),
        ("same", "'same'"),
    ],
)
def test_text_of_arguments(value: Any, text: str) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(operator.getitem, (graph.placeholder("x"), value)))
    graph_module = fx.GraphModule(nn.Module(), graph)
    assert f"getitem(x, {text})" in listing.to_text(graph_module)


def test_text_of_several_results() -> None:
    graph_module = annotated(make(lambda self, x: torch.chunk(x, 2, dim=3)), image())
    assert (
        "chunk(x, 2, dim=3) (f32[1,3,8,4], f32[1,3,8,4])" in lines(listing.to_text(graph_module))[1]
    )


def test_text_shows_what_a_module_says_about_itself() -> None:
    class Quantizer(nn.Identity):
        operation = "quantize"
        detail = "u8 s=0.5"

    graph_module = float_graph(make(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 3, 1)))
    graph_module.conv = Quantizer()
    assert "conv = quantize(x) u8 s=0.5" in lines(listing.to_text(graph_module))


@pytest.mark.parametrize(
    ("activation", "residual", "expected"),
    [
        ("none", False, "conv2d"),
        ("relu", False, "conv2d_relu"),
        ("none", True, "conv2d_add"),
        ("relu6", True, "conv2d_add_relu6"),
    ],
)
def test_operation_of_a_fused_layer(activation: str, residual: bool, expected: str) -> None:
    graph_module = float_graph(make(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 3, 1)))
    graph_module.conv = FusedLayer(graph_module.conv, activation)
    graph_module.conv.has_residual = residual
    (node,) = graph_module.graph.find_nodes(op="call_module", target="conv")
    assert listing.operation(node) == expected


def test_operation_of_operator_overloads_and_methods() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert listing.operation(graph.call_function(torch.ops.aten.relu.default, (x,))) == "relu"
    quantized = graph.call_function(torch.ops.quantized.linear.default, (x,))
    assert listing.operation(quantized) == "quantized.linear"
    assert listing.operation(graph.call_method("size", (x, 0))) == ".size"


def test_counts_leave_out_inputs_constants_and_output() -> None:
    assert listing.count_operations(small()) == {"conv2d": 1, "relu": 1, "add": 1}


def test_json_lists_every_node() -> None:
    nodes = json.loads(listing.to_json(small()))["nodes"]
    assert [node["name"] for node in nodes] == ["x", "conv", "relu", "shift", "add", "output"]
    assert nodes[1] == {
        "name": "conv",
        "op": "call_module",
        "operation": "conv2d",
        "target": "conv",
        "args": ["x"],
        "kwargs": {},
        "tensor": "f32[1,4,8,8]",
        "module_path": "conv",
        "origin": ["conv"],
    }
    assert nodes[2]["kwargs"] == {"inplace": "False"}


def test_dot_draws_nodes_and_edges() -> None:
    text = listing.to_dot(small())
    assert text.startswith("digraph {\n")
    assert text.endswith("}\n")
    assert '"relu" -> "add";' in text
    assert '"conv" [label="conv\\nconv2d\\nf32[1,4,8,8]"];' in text


def test_diff_of_equal_listings_is_empty() -> None:
    assert listing.diff("a = f()   f32\n", "a = f()  f32\n") == ""


def test_diff_is_unified_and_names_the_pass() -> None:
    text = listing.diff("a\nb\nc\nd\n", "a\nB\nc\nd\n", name="rename")
    assert text.splitlines() == [
        "--- before rename",
        "+++ after rename",
        "@@ -1,3 +1,3 @@",
        " a",
        "-b",
        "+B",
        " c",
    ]


def test_dtypes_have_short_names() -> None:
    graph_module = small()
    node = next(iter(graph_module.graph.nodes))
    for dtype, name in ((torch.int8, "i8"), (torch.quint8, "qu8"), (torch.bool, "bool")):
        node.meta["tensor"] = TensorInfo((2,), dtype)
        assert listing.to_text(graph_module).splitlines()[0].endswith(f"{name}[2]")
