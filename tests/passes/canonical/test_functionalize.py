from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import PassError
from passes.canonicalize import Canonicalize
from tests.passes.checking import Checked, Function, check


def canonical(model: Any, **options: Any) -> Checked:
    if not isinstance(model, nn.Module):
        function = model
        model = Function(lambda _, x: function(x))
    return check(Canonicalize(), model, torch.randn(2, 4, 6, 6), **options)


def written_in_place(build: Callable[[fx.Graph, fx.Node], Any]) -> fx.GraphModule:
    """A graph of what torch.fx does not record by itself: the writes of fxquant's tracer."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(nn.Module(), graph)


def test_later_readers_see_what_was_written() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        F.relu(y, inplace=True)
        return y + 1

    canonical(
        forward,
        expect="""
            x    = input                    f32[2,4,6,6]
            mul  = mul(x, 2)                f32[2,4,6,6]
            relu = relu(mul, inplace=False) f32[2,4,6,6]
            add  = add(relu, 1)             f32[2,4,6,6]
            return add""",
    )


def test_earlier_readers_see_what_was_there() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        early = y.sum()
        return y.relu_() + early

    canonical(forward)


def test_a_view_sees_a_write_into_its_source() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        flat = y.view(2, -1)
        y.relu_()
        return flat

    assert canonical(forward).operations == {"mul": 1, "relu": 1, "reshape": 1}


def test_the_source_sees_a_write_into_a_view() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].relu_()
        y.flatten(1).mul_(3)
        return y

    canonical(forward)


def test_a_write_through_identity_and_dropout_is_seen() -> None:
    model = Function(
        lambda s, x: (s.relu(s.drop(y := x * 2)), y),
        relu=nn.ReLU(inplace=True),
        drop=nn.Dropout(),
    )
    canonical(model)


def test_pieces_of_a_split_do_not_touch_each_other() -> None:
    def forward(x: Tensor) -> Tensor:
        a, b = (x * 2).chunk(2, 1)
        return torch.cat([a.relu_(), b], 1)

    canonical(forward)


def test_refuses_a_write_that_it_cannot_follow() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y.transpose(1, 2).relu_()
        return y

    with pytest.raises(PassError, match=r"transpose.* is written in place .*view of mul"):
        canonical(forward)


def test_item_assignment_is_a_new_value() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        y = graph.call_function(torch.mul, (x, 2))
        graph.call_function(operator.setitem, (y, (slice(None), 0), 1.0))
        return y

    assert canonical(written_in_place(build)).operations == {"mul": 1, "with_item": 1}


def test_augmented_addition_is_a_write() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        y = graph.call_function(torch.mul, (x, 2))
        z = graph.call_function(operator.iadd, (y, x))
        return y, z

    assert canonical(written_in_place(build)).operations == {"mul": 1, "add": 1}


def test_augmented_addition_of_sizes_is_none() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        n = graph.call_method("size", (x, 0))
        m = graph.call_function(operator.iadd, (n, 1))
        return graph.call_method("new_zeros", (x, (n, m)))

    canonical(written_in_place(build))
