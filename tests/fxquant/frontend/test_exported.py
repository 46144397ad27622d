from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.errors import TraceError
from fxquant.frontend.exported import export, from_graph_module, from_program
from passes import Canonicalize, EliminateNoops, FoldConstants, Pipeline
from passes.infra.listing import operation
from tests.passes.checking import Function

IMAGE = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, *values: Any, names: tuple[str, ...] = ("x",)) -> fx.GraphModule:
    """The graph, canonical, which is asserted to give what the model gives."""
    graph, _ = export(model.eval(), names, values)
    with torch.no_grad():
        torch.testing.assert_close(graph(*values), model(*values), rtol=0, atol=0)
        Pipeline([Canonicalize(), EliminateNoops(), FoldConstants()]).run(graph, values)
        torch.testing.assert_close(graph(*values), model(*values), rtol=1e-5, atol=1e-5)
    left = [n for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert left == []
    return graph


def operations(graph: fx.GraphModule) -> list[str]:
    skipped = ("placeholder", "get_attr", "output")
    return [operation(node) for node in graph.graph.nodes if node.op not in skipped]


class Branching(nn.Module):
    """No symbolic trace exists of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.shape[2] > 4:
            x = F.max_pool2d(x, 2)
        for row in range(x.shape[2]):
            x = x + x[:, :, row : row + 1]
        return self.head(x.mean((2, 3)))


def test_layers_are_modules_at_their_own_paths_with_the_models_tensors() -> None:
    model = Branching()
    graph = exported(model, IMAGE)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["body.0", "body.1", "head"]
    assert graph.get_submodule("body.0").weight is model.body[0].weight
    assert isinstance(graph.get_submodule("body.1"), nn.BatchNorm2d)


def test_nodes_know_their_module_and_the_line_of_the_model() -> None:
    graph, _ = export(Branching().eval(), ("x",), (IMAGE,))
    nodes = {node.name: node for node in graph.graph.nodes}
    assert nodes["conv2d"].meta["module_path"] == "body.0"
    assert nodes["max_pool2d"].meta["module_path"] == ""
    assert "test_exported.py" in nodes["max_pool2d"].meta["stack_trace"]
    assert "F.max_pool2d(x, 2)" in nodes["max_pool2d"].meta["stack_trace"]


def test_the_batch_size_stays_free() -> None:
    model = Branching().eval()
    graph, fixed = export(model, ("x",), (IMAGE[:1],))
    x = torch.randn(5, 8, 6, 6)
    assert fixed == ""
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_a_model_for_one_batch_size_says_so() -> None:
    model = Function(
        lambda s, x: s.conv(x) + (1.0 if x.shape[0] == 2 else 2.0), conv=nn.Conv2d(8, 8, 1)
    )
    _, fixed = export(model.eval(), ("x",), (IMAGE,))
    assert fixed == "its graph is for inputs of exactly the shape [2, 8, 6, 6]"


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda x: x[:, 1:3] + x[:, -2:], ["getitem", "getitem", "add"]),
        (lambda x: x[..., -1], ["getitem"]),
        (lambda x: x[:, torch.tensor([2, 0])], ["getitem"]),
        (lambda x: F.interpolate(x, scale_factor=2), ["interpolate"]),
        (
            lambda x: F.interpolate(x, (9, 7), mode="bilinear", align_corners=True),
            ["interpolate"],
        ),
        (lambda x: F.interpolate(x, (9, 7), mode="bicubic", antialias=True), ["interpolate"]),
        (lambda x: F.pad(x, (1, 2, 0, 0), mode="reflect"), ["pad"]),
        (lambda x: F.adaptive_max_pool2d(x, 2), ["adaptive_max_pool2d"]),
        (lambda x: F.gelu(x, approximate="tanh"), ["gelu"]),
        (lambda x: F.elu(x) + F.silu(x), ["elu", "silu", "add"]),
        (lambda x: F.hardtanh(x, 0, 6), ["relu6"]),
        (lambda x: 3 - x, ["sub"]),
        (lambda x: x.chunk(2, 1)[1].contiguous(), ["chunk", "getitem"]),
        (lambda x: torch.split(x, [3, 5], 1)[0].detach(), ["split", "getitem"]),
        (lambda x: x.flatten(2).transpose(1, 2), ["flatten", "transpose"]),
        (lambda x: x.expand(3, 2, 8, 6, 6), [".expand"]),
        (lambda x: x.new_zeros(6, 6) + x, ["add"]),
        (lambda x: x + torch.arange(6, dtype=x.dtype), ["add"]),
        (lambda x: torch.einsum("nchw,ncvw->nhv", x, x), ["einsum"]),
        (lambda x: x.to(torch.float64).type_as(x), [".to", ".to"]),
        (lambda x: x.clamp_min(0.1).add_(1).mul_(2), ["clamp", "add", "mul"]),
        (lambda x: F.normalize(x, dim=1), ["normalize"]),
        (lambda x: x.view(x.shape[0], -1), [".size", "reshape"]),
        (lambda x: F.group_norm(x, 2), ["groupnorm"]),
        (lambda x: F.instance_norm(x), ["instance_norm"]),
        (lambda x: F.softmax(x, 1) @ x, ["softmax", "matmul"]),
        (lambda x: x.amax((2, 3)), ["amax"]),
        (lambda x: F.pixel_shuffle(x, 2), ["pixel_shuffle"]),
        (lambda x: F.fold(F.unfold(x, 2), (6, 6), 2), ["unfold", "fold"]),
        (lambda x: F.dropout(x + 1, 0.5, training=False, inplace=True), ["add"]),
    ],
)  # fmt: skip
def test_aten_operators_become_the_canonical_ones(
    forward: Callable[[Tensor], Tensor], expected: list[str]
) -> None:
    model = Function(lambda s, x: forward(x))
    assert operations(exported(model, IMAGE.clone())) == expected


def test_writes_through_slices_are_new_values() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :2] = x[:, :2]
        y[:, 3].add_(1.0)
        return y * 2

    exported(Function(forward), IMAGE)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
def test_recurrent_layers_are_modules_again(kind: Any, options: dict[str, Any]) -> None:
    layer = kind(8, 5, batch_first=True, **options)
    model = Function(lambda s, x: s.layer(x.flatten(2).transpose(1, 2))[0], layer=layer)
    graph = exported(model, IMAGE)
    assert isinstance(graph.get_submodule("layer"), kind)


def test_a_program_and_its_module_become_the_same_graph() -> None:
    model = Branching().eval()
    program = torch.export.export(model, (IMAGE,))
    first, second = from_program(program), from_graph_module(program.module())
    assert str(first.graph) == str(second.graph)
    torch.testing.assert_close(second(IMAGE), model(IMAGE), rtol=0, atol=0)


def test_a_program_of_core_operators_has_layers_too() -> None:
    program = torch.export.export(Branching().eval(), (IMAGE,)).run_decompositions()
    graph = from_program(program)
    assert {F.conv2d, F.linear} <= {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(IMAGE), program.module()(IMAGE), rtol=1e-5, atol=1e-5)


def test_the_structure_of_outputs_is_the_models() -> None:
    model = Function(lambda s, x: {"a": x + 1, "b": (x * 2, [x - 1])})
    graph, _ = export(model.eval(), ("x",), (IMAGE,))
    found = graph(IMAGE)
    assert list(found) == ["a", "b"]
    assert torch.equal(found["b"][1][0], IMAGE - 1)
    assert operator.getitem not in {node.target for node in graph.graph.nodes}


def test_what_stands_under_a_context_has_no_bracket() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = torch.relu(self.conv(x.float()))
        with torch.no_grad():
            return x.mean((2, 3))

    model = Function(forward)
    model.conv = nn.Conv2d(8, 4, 3)
    assert operations(exported(model, IMAGE)) == ["conv2d", "relu", "mean"]


def test_a_cast_that_a_context_makes_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.conv(x)

    model = Function(forward)
    model.conv = nn.Conv2d(8, 4, 3)
    with pytest.raises(TraceError, match="wrap_with_autocast"):
        export(model.eval(), ("x",), (IMAGE,))
