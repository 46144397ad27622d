from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import FuseConvBnRelu, InferRanges, Interval, is_non_negative, range_of
from tests.passes.checking import check
from tests.passes.models import annotated, batch_norm, image, make

INF = math.inf
WHOLE = Interval(-INF, INF)


def ranges(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graph_module = annotated(model, *(inputs or (image(4),)))
    InferRanges().run(graph_module)
    return graph_module


def result(function: Callable[..., Any], *inputs: Tensor, **members: Any) -> Interval:
    """The range of what `function` returns for unknown inputs."""
    graph_module = ranges(make(function, **members), *inputs)
    return range_of(graph_module.graph.output_node().args[0])


def test_the_graph_stays_and_the_notes_list_what_is_proven() -> None:
    model = make(
        lambda self, x: F.max_pool2d(F.relu(self.conv(x)), kernel_size=2), conv=nn.Conv2d(4, 2, 1)
    )
    found = check(InferRanges(), model, image(4), modified=False)
    assert found.result.notes == (
        "relu in [0, ∞): relu",
        "max_pool2d in [0, ∞): max_pool2d of relu",
    )
    again = InferRanges().run(found.graph_module)
    assert again == found.result


def test_nothing_is_known_of_inputs_and_layers() -> None:
    assert result(lambda self, x: self.conv(x), conv=nn.Conv2d(4, 2, 1)) == WHOLE
    assert result(lambda self, x: self.bn(F.relu(x)), bn=batch_norm(4)) == WHOLE
    assert result(lambda self, x: torch.sin(F.relu(x))) == WHOLE


NON_NEGATIVE: list[tuple[Callable[..., Any], str]] = [
    (lambda self, x: F.relu(x), "relu"),
    (lambda self, x: F.relu6(x), "relu6 ⊂ [0, 6]"),
    (lambda self, x: torch.sigmoid(x), "sigmoid ⊂ [0, 1]"),
    (lambda self, x: F.hardsigmoid(x), "hardsigmoid ⊂ [0, 1]"),
    (lambda self, x: F.softmax(x, dim=1), "softmax ⊂ [0, 1]"),
    (lambda self, x: torch.clamp(x, min=0, max=3), "clamp ⊂ [0, 3]"),
    (lambda self, x: F.hardtanh(x, min_val=0.5, max_val=3.0), "hardtanh ⊂ [0.5, 3]"),
    (lambda self, x: torch.exp(x), "exp ≥ 0"),
    (lambda self, x: torch.abs(x), "abs"),
    (lambda self, x: torch.square(x), "square"),
    (lambda self, x: torch.pow(x, 2), "square"),
    (lambda self, x: torch.pow(x, 4), "even power"),
    (lambda self, x: torch.mul(x, x), "square"),
    (lambda self, x: torch.tanh(F.relu(x)), "tanh of relu"),
    (lambda self, x: F.silu(F.relu(x)), "silu of relu"),
    (lambda self, x: F.leaky_relu(F.relu(x)), "leaky_relu of relu"),
    (lambda self, x: F.elu(F.relu(x)), "elu of relu"),
    (lambda self, x: F.max_pool2d(F.relu(x), kernel_size=2, padding=1), "max_pool2d of relu"),
    (lambda self, x: F.avg_pool2d(F.relu(x), kernel_size=2, padding=1), "avg_pool2d of relu"),
    (lambda self, x: F.avg_pool2d(F.relu(x), 2, divisor_override=3), "sum of non-negatives"),
    (
        lambda self, x: F.adaptive_avg_pool2d(F.relu(x), output_size=(1, 1)),
        "adaptive_avg_pool2d of relu",
    ),
    (lambda self, x: torch.mean(F.relu(x), dim=(2, 3)), "mean of relu"),
    (lambda self, x: torch.cat((F.relu(x), F.relu(x)), dim=1), "cat of relu, relu"),
    (lambda self, x: torch.stack((F.relu(x), torch.exp(x))), "stack of relu, exp ≥ 0"),
    (lambda self, x: torch.add(F.relu(x), torch.exp(x)), "sum of non-negatives"),
    (lambda self, x: torch.add(F.relu(x), 1.5), "sum of non-negatives"),
    (lambda self, x: torch.mul(F.relu(x), torch.sigmoid(x)), "product of non-negatives"),
    (lambda self, x: torch.mul(F.relu(x), 0.5), "product of non-negatives"),
    (lambda self, x: torch.mul(torch.neg(F.relu(x)), -1.0), "product of non-positives"),
    (lambda self, x: torch.matmul(F.relu(x), torch.exp(x)), "product of non-negatives"),
    (lambda self, x: torch.div(F.hardsigmoid(x), 6.0), "quotient of non-negatives"),
    (lambda self, x: torch.div(F.relu(x), F.relu6(x)), "quotient of non-negatives"),
    (lambda self, x: torch.maximum(x, F.relu(x)), "maximum of relu"),
    (lambda self, x: torch.sub(F.relu(x), -1.0), "difference of relu, constant"),
    (lambda self, x: F.relu(x)[:, 1:], "relu"),
    (lambda self, x: torch.chunk(F.relu(x), 2, dim=1)[1], "relu"),
    (lambda self, x: torch.split(F.relu(x), 2, dim=1)[0], "relu"),
    (lambda self, x: F.pad(F.relu(x), pad=(1, 1)), "zero padding of relu"),
    (lambda self, x: F.pad(F.relu(x), pad=(1, 1), value=2.0), "padding of relu"),
    (
        lambda self, x: F.pad(F.relu(x), pad=(1, 1, 1, 1), mode="reflect"),
        "reflect padding of relu",
    ),
    (lambda self, x: torch.reshape(F.relu(x), (1, -1)), "reshape of relu"),
    (lambda self, x: torch.permute(F.relu(x), (0, 2, 3, 1)), "permute of relu"),
    (lambda self, x: torch.transpose(F.relu(x), 1, 2), "transpose of relu"),
    (lambda self, x: torch.flatten(F.relu(x), 1), "flatten of relu"),
    (lambda self, x: torch.squeeze(F.relu(x)), "squeeze of relu"),
    (lambda self, x: F.channel_shuffle(F.relu(x), 2), "channel_shuffle of relu"),
    (lambda self, x: torch.roll(F.relu(x), 1, 2), "roll of relu"),
    (lambda self, x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear"), "interpolate of"),
    (lambda self, x: F.relu(x).contiguous(), "contiguous of relu"),
]


@pytest.mark.parametrize(
    ("function", "proof"), NON_NEGATIVE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_proves_non_negative(function: Callable[..., Any], proof: str) -> None:
    found = result(function)
    assert found.non_negative
    assert found.proof.startswith(proof)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: torch.add(F.relu(x), x),
        lambda self, x: torch.add(F.relu(x), -1.0),
        lambda self, x: torch.add(F.relu(x), F.relu(x), alpha=-1),
        lambda self, x: torch.sub(F.relu(x), F.relu(x)),
        lambda self, x: torch.mul(F.relu(x), x),
        lambda self, x: torch.mul(F.relu(x), -2.0),
        lambda self, x: torch.div(F.relu(x), x),
        lambda self, x: torch.cat((F.relu(x), x), dim=1),
        lambda self, x: F.pad(F.relu(x), pad=(1, 1), value=-1.0),
        lambda self, x: F.interpolate(F.relu(x), scale_factor=2, mode="bicubic"),
        lambda self, x: torch.clamp(x, max=6),
        lambda self, x: torch.clamp(F.relu(x), max=-1),
        lambda self, x: torch.pow(x, 3),
        lambda self, x: F.hardswish(x),
        lambda self, x: F.leaky_relu(x, negative_slope=0.1),
        lambda self, x: torch.minimum(F.relu(x), x),
        lambda self, x: torch.where(x > 0, F.relu(x), x),
        lambda self, x: torch.matmul(F.relu(x), x),
        lambda self, x: torch.log(F.relu(x)),
    ],
)
def test_does_not_prove(function: Callable[..., Any]) -> None:
    assert not result(function).non_negative


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (lambda self, x: F.hardswish(x), -0.375, INF),
        (lambda self, x: F.silu(x), -0.2785, INF),
        (lambda self, x: F.gelu(x), -0.1701, INF),
        (lambda self, x: F.elu(x, alpha=2.0), -2, INF),
        (lambda self, x: F.relu(F.relu6(x)), 0, 6),
        (lambda self, x: torch.add(F.relu6(x), F.relu6(x)), 0, 12),
        (lambda self, x: torch.mul(F.relu6(x), -2.0), -12, 0),
        (lambda self, x: torch.sub(torch.sigmoid(x), 0.5), -0.5, 0.5),
        (lambda self, x: torch.div(F.relu6(torch.add(x, 3.0)), 6.0), 0, 1),
        (lambda self, x: torch.clamp(torch.sigmoid(x), min=0.25), 0.25, 1),
        (lambda self, x: torch.abs(torch.tanh(x)), 0, 1),
        (lambda self, x: torch.square(torch.mul(torch.tanh(x), 3.0)), 0, 9),
        (lambda self, x: F.pad(torch.exp(torch.add(x, 1)), pad=(1, 1)), 0, INF),
        (lambda self, x: F.pad(torch.add(torch.sigmoid(x), 1.0), pad=(1, 1)), 0, 2),
        (lambda self, x: F.avg_pool2d(torch.add(torch.sigmoid(x), 1.0), 2, padding=1), 0, 2),
        (lambda self, x: F.leaky_relu(torch.tanh(x), negative_slope=0.5), -0.5, 1),
        (lambda self, x: torch.neg(F.relu6(x)), -6, 0),
        (lambda self, x: torch.minimum(F.relu(x), torch.sigmoid(x)), 0, 1),
    ],
)
def test_bounds(function: Callable[..., Any], low: float, high: float) -> None:
    found = result(function)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_constants_have_the_range_of_their_elements() -> None:
    gain = torch.tensor([[0.5]])
    found = result(lambda self, x: torch.mul(F.relu6(x), self.gain), gain=gain)
    assert (found.low, found.high) == (0, 3)


def test_constants_that_are_not_numbers_prove_nothing() -> None:
    gain = torch.tensor([math.nan])
    assert result(lambda self, x: torch.mul(F.relu(x), self.gain), gain=gain) == WHOLE


def test_embeddings_have_the_range_of_their_table() -> None:
    table = nn.Embedding.from_pretrained(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    found = result(lambda self, x: self.table(x), torch.tensor([0, 1]), table=table)
    assert (found.low, found.high) == (0, 3)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x: F.relu(self.conv(x)), Interval(0, INF, "relu")),
        (lambda self, x: F.relu6(self.conv(x)), Interval(0, 6, "relu6 ⊂ [0, 6]")),
        (lambda self, x: F.relu(torch.add(self.conv(x), x)), Interval(0, INF, "relu")),
        (lambda self, x: torch.add(self.conv(x), x), WHOLE),
        (lambda self, x: F.relu(torch.add(torch.sin(x), x)), Interval(0, INF, "relu")),
    ],
)
def test_reads_fused_operations(function: Callable[..., Any], expected: Interval) -> None:
    graph_module = annotated(make(function, conv=nn.Conv2d(4, 4, 1)), image(4))
    FuseConvBnRelu().run(graph_module)
    InferRanges().run(graph_module)
    assert range_of(graph_module.graph.output_node().args[0]) == expected


def test_sizes_have_no_range() -> None:
    graph_module = ranges(make(lambda self, x: torch.reshape(F.relu(x), (x.size(0), -1))))
    (size,) = graph_module.graph.find_nodes(op="call_method", target="size")
    assert "range" not in size.meta


def test_without_the_pass_nothing_is_proven() -> None:
    graph_module = annotated(make(lambda self, x: F.relu(x)), image(4))
    (relu,) = graph_module.graph.find_nodes(op="call_function", target=F.relu)
    assert not is_non_negative(relu)
    relu.meta["range"] = None
    assert not is_non_negative(relu)


def test_a_second_run_forgets_what_no_longer_holds() -> None:
    graph_module = ranges(make(lambda self, x: torch.flatten(F.relu(x), 1)))
    relu, flatten = list(graph_module.graph.nodes)[1:3]
    flatten.replace_input_with(relu, next(iter(graph_module.graph.nodes)))
    InferRanges().run(graph_module)
    assert not is_non_negative(flatten)


def test_long_proofs_are_cut() -> None:
    def forward(self: Any, x: Any) -> Any:
        for _ in range(12):
            x = torch.cat((F.max_pool2d(F.relu(x), 1), F.relu(x)), dim=1)
        return x

    proof = result(forward, image(1, 2)).proof
    assert proof == "cat of max_pool2d of relu, relu"


@pytest.mark.parametrize("function", [function for function, _ in NON_NEGATIVE])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_values_lie_in_their_ranges(function: Callable[..., Any], scale: float) -> None:
    graph_module = ranges(make(function))

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found = n.meta.get("range")
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor) and found and n.op != "output":
                    finite = tensor[~tensor.isnan()].double()
                    assert (finite >= found.low).all()
                    assert (finite <= found.high + 1e-6 * abs(found.high)).all()
            return value

    Watch(graph_module).run(image(4) * scale)


def test_a_range_is_forgotten_where_nothing_is_known_any_more() -> None:
    graph_module = ranges(make(lambda self, x: torch.neg(F.relu(x))))
    (relu,) = [node for node in graph_module.graph.nodes if node.name == "relu"]
    assert is_non_negative(relu)
    del relu.meta["tensor"]
    InferRanges().run(graph_module)
    assert "range" not in relu.meta


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.leaky_relu(torch.clamp(x, min=-2, max=1), negative_slope=-0.5),
        lambda self, x: F.elu(x, alpha=-1.0),
        lambda self, x: torch.div(torch.clamp(x, min=0.5, max=1), 1.0, rounding_mode="floor"),
    ],
    ids=["leaky relu that rises", "elu that rises", "division that rounds"],
)
def test_nothing_is_claimed_of_a_function_with_other_settings(function: Callable[..., Any]) -> None:
    assert result(function) == WHOLE


def test_rows_that_an_embedding_scales_are_not_those_stored() -> None:
    rows = nn.Embedding(5, 4, max_norm=1.0)
    assert result(lambda self, x: self.rows(x), torch.tensor([[1, 2]]), rows=rows) == WHOLE
