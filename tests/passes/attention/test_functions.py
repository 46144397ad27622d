from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import masked_softmax, scaled_matmul
from passes.infra import listing, verify


def test_scaled_matmul_is_a_product_times_a_number() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(4, 5)
    assert torch.equal(scaled_matmul(a, b, scale=0.5), (a @ b) * 0.5)


def test_masked_softmax_shares_among_the_positions_left() -> None:
    x, mask = torch.randn(3, 4), torch.tensor([True, False, True, True])
    expected = torch.zeros(3, 4)
    expected[:, mask] = F.softmax(x[:, mask], dim=-1)
    torch.testing.assert_close(masked_softmax(x, mask), expected)


def test_masked_softmax_along_another_dim() -> None:
    x, mask = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    torch.testing.assert_close(masked_softmax(x, mask, dim=0), masked_softmax(x.T, mask.T).T)


def test_a_row_that_is_hidden_as_a_whole_is_zero() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    assert masked_softmax(torch.randn(2, 2), mask)[1].tolist() == [0, 0]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3, 3).tril().bool())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return masked_softmax(scaled_matmul(x, y, scale=0.25), self.mask)


def test_each_is_one_node_of_a_traced_graph() -> None:
    graph_module = fx.symbolic_trace(Both())
    inputs = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    outputs = verify.run_and_annotate(graph_module, inputs, name="traced")
    assert torch.equal(outputs, Both()(*inputs))
    assert torch.equal(outputs, graph_module(*inputs))
    assert [" ".join(line.split()) for line in listing.to_text(graph_module).splitlines()] == [
        "x = input f32[2,3,4]",
        "y = input f32[2,4,3]",
        "scaled_matmul = scaled_matmul(x, y, scale=0.25) f32[2,3,3]",
        "mask = constant(mask) bool[3,3]",
        "masked_softmax = masked_softmax(scaled_matmul, mask, dim=-1) f32[2,3,3]",
        "return masked_softmax",
    ]
