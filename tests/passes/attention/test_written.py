from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.frontend.trace import trace
from tests.passes.attention.graphs import QKV, decompose
from tests.passes.checking import Function

CAUSAL = torch.full((5, 5), -math.inf).triu(1)


@pytest.mark.parametrize(
    "spelled",
    [
        lambda q, k: (q * 0.5) @ k.transpose(-2, -1),
        lambda q, k: q @ (k / 2).transpose(-2, -1),
        lambda q, k: q @ (k.transpose(-2, -1) * 0.5),
        lambda q, k: (q @ k.mT) * 0.5,
        lambda q, k: torch.matmul(q, k.transpose(2, 3)) / math.sqrt(4.0),
        lambda q, k: torch.matmul(q, k.transpose(2, 3)) / (k.size(-1) ** 0.5),
        lambda q, k: torch.matmul(q, k.transpose(2, 3)) / torch.full([], 2.0),
        lambda q, k: torch.matmul(q / 2**0.5, k.transpose(2, 3) / 2**0.5),
        lambda q, k: (2 * q).reshape(2, 2, 3, 4) @ (k * 0.25).permute(0, 1, 3, 2),
    ],
)
def test_factors_go_into_the_product(spelled: Callable[..., Any]) -> None:
    found = decompose(spelled, *QKV[:2], modified=True)
    assert set(found.operations) <= {"transpose", "permute", "reshape", "scaled_matmul"}
    (product,) = found.nodes("scaled_matmul")
    assert product.kwargs["scale"] == pytest.approx(0.5)


def test_factors_of_batched_products() -> None:
    inputs = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    found = decompose(lambda a, b: torch.bmm(a * 0.5, b), *inputs, modified=True)
    assert found.operations == {"scaled_matmul": 1}


def test_factors_that_cancel_leave_a_plain_product() -> None:
    found = decompose(lambda q, k: (q * 2) @ (k / 2).mT, *QKV[:2], modified=True)
    assert "scaled_matmul" not in found.operations


def test_keeps_a_factor_of_what_is_read_elsewhere() -> None:
    def forward(q: Tensor, k: Tensor) -> Any:
        scaled = q * 0.5
        return scaled @ k.transpose(-2, -1), scaled

    found = decompose(forward, *QKV[:2], modified=False)
    assert found.reasons == ("what it scales is read elsewhere too",)


def test_keeps_the_factor_of_a_square() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 0.5
        return y @ y

    decompose(forward, torch.randn(2, 3, 3), modified=False)


def test_keeps_factors_of_layers_and_vectors() -> None:
    model = Function(lambda self, x: (x @ self.weight) * 0.5, weight=nn.Parameter(torch.eye(4)))
    decompose(model, torch.randn(2, 3, 4), modified=False)
    decompose(lambda q, k: q @ (k * torch.arange(4.0)).transpose(-2, -1), *QKV[:2], modified=False)


SCORES = torch.randn(2, 2, 5, 5)
LOWER = torch.ones(5, 5).tril()


@pytest.mark.parametrize(
    "spelled",
    [
        lambda s: F.softmax(s + CAUSAL, dim=-1),
        lambda s: F.softmax(CAUSAL.nan_to_num(neginf=-1e4) + s, dim=3),
        lambda s: (s + (1 - LOWER) * torch.finfo(torch.float32).min).softmax(-1),
        lambda s: s.masked_fill(LOWER == 0, float("-inf")).softmax(dim=-1),
        lambda s: s.masked_fill(~LOWER.bool(), -1e9).softmax(dim=-1),
        lambda s: torch.where(LOWER.bool(), s, -1e4).softmax(dim=-1),
        lambda s: torch.where(LOWER.bool(), s, torch.full([], -1e5)).softmax(dim=-1),
        lambda s: torch.where(LOWER == 0, torch.full((), -1e5), s).softmax(dim=-1),
        lambda s: F.softmax(s + torch.full((5, 5), -math.inf).triu(1), dim=-1, dtype=torch.float32),
        lambda s: F.softmax(
            s.masked_fill(torch.full((s.size(-1), s.size(-1)), 1.0).triu(1).bool(), -math.inf),
            dim=-1,
        ),
        lambda s: F.softmax(s + LOWER.log() + CAUSAL, dim=-1),
        lambda s: F.softmax(s + torch.tril(torch.ones(5, 5)).log()[None, None], dim=-1),
    ],
)
def test_causal_masks_become_the_mask_of_the_softmax(spelled: Callable[..., Any]) -> None:
    found = decompose(spelled, SCORES, modified=True)
    assert found.operations == {"masked_softmax": 1}
    (softmax,) = found.nodes("masked_softmax")
    mask = getattr(found.graph_module, str(softmax.args[1].target))
    assert mask.dtype is torch.bool
    assert torch.equal(mask.reshape(5, 5), LOWER.bool())


def test_masked_softmax_listing() -> None:
    decompose(
        lambda s: F.softmax(s + CAUSAL, dim=-1),
        SCORES,
        expect="""
            a = input                                                    f32[2,2,5,5]
            attention_mask = constant(attention_mask)                    bool[5,5]
            masked_softmax = masked_softmax(a, attention_mask, dim=-1)   f32[2,2,5,5]
            return masked_softmax""",
    )


def test_a_mask_of_the_running_model() -> None:
    found = decompose(
        lambda s, m: s.masked_fill(m, -math.inf).softmax(-1), SCORES, LOWER == 0, modified=True
    )
    assert found.operations == {"logical_not": 1, "masked_softmax": 1}


def test_a_mask_below_a_bias() -> None:
    found = decompose(
        lambda s, b: ((s + CAUSAL) + b).softmax(-1), SCORES, torch.randn(5, 5), modified=True
    )
    assert found.operations == {"add": 1, "masked_softmax": 1}


@pytest.mark.parametrize(
    ("spelled", "reasons"),
    [
        (lambda s: (s + LOWER * -100).softmax(-1), ()),
        (lambda s: (s + LOWER).softmax(-1), ()),
        (lambda s: s.masked_fill(LOWER == 0, -5.0).softmax(-1), ()),
        (lambda s: (s + CAUSAL).softmax(1), ("the softmax is not over the last dim",)),
        (lambda s: (s + LOWER.new_full((5, 5), -1e9)).softmax(-1), ("the mask hides a whole row",)),
        (
            lambda s: (s[:, :1] + CAUSAL.expand(2, 2, 5, 5)).softmax(-1),
            ("the mask has a larger shape than the scores",),
        ),
    ],
)
def test_leaves_other_masks(spelled: Callable[..., Any], reasons: tuple[str, ...]) -> None:
    found = decompose(spelled, SCORES, modified=False)
    assert found.reasons == reasons
    assert "softmax" in found.operations


class CausalAttention(nn.Module):
    """Causal self-attention as language models write it out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.size()
        q, k, v = (
            part.view(n, t, 2, c // 2).transpose(1, 2)
            for part in (self.qkv(x)[:, :, i * 8 : i * 8 + 8] for i in range(3))
        )
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(4)
        future = torch.triu(torch.full((t, t), -math.inf), diagonal=1)
        y = F.softmax((scores + future).float(), dim=-1).type_as(q) @ v
        return self.out(y.transpose(1, 2).contiguous().view(n, t, c))


def test_causal_attention_made_in_forward() -> None:
    graph_module = trace(CausalAttention().eval()).graph_module
    found = decompose(graph_module, torch.randn(3, 5, 8), modified=True)
    assert {"scaled_matmul", "masked_softmax", "matmul"} <= set(found.operations)
    assert not {"softmax", "div", "triu", "full"} & set(found.operations)
