from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import DecomposeAttention
from passes.infra import verify
from tests.passes.attention.graphs import QKV, Inputs, decompose
from tests.passes.checking import float_graph


class Attention(nn.Module):
    """MultiheadAttention of x, with `call` as the keywords of its call."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        self.call = call or {}
        for name, value in self.call.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        call = {
            name: getattr(self, name) if isinstance(value, Tensor) else value
            for name, value in self.call.items()
        }
        outputs = self.attention(x, x, x, **call)
        return outputs if call.get("need_weights", True) else outputs[0]


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 5, 8))


CAUSAL = torch.full((5, 5), -math.inf).triu(1)


# -- nn.MultiheadAttention ----------------------------------------------------------------


def test_multihead_attention() -> None:
    found = decompose(
        Attention({"need_weights": False}),
        tokens(),
        expect="""
            x = input                                                     f32[3,5,8]
            attention_q_proj = linear(x)                                  f32[3,5,8]
            reshape = reshape(attention_q_proj, shape=(-1, 5, 2, 4))      f32[3,5,2,4]
            permute = permute(reshape, dims=(0, 2, 1, 3))                 f32[3,2,5,4]
            attention_k_proj = linear(x)                                  f32[3,5,8]
            reshape_1 = reshape(attention_k_proj, shape=(-1, 5, 2, 4))    f32[3,5,2,4]
            permute_1 = permute(reshape_1, dims=(0, 2, 3, 1))             f32[3,2,4,5]
            attention_v_proj = linear(x)                                  f32[3,5,8]
            reshape_2 = reshape(attention_v_proj, shape=(-1, 5, 2, 4))    f32[3,5,2,4]
            permute_2 = permute(reshape_2, dims=(0, 2, 1, 3))             f32[3,2,5,4]
            scaled_matmul = scaled_matmul(permute, permute_1, scale=0.5)  f32[3,2,5,5]
            softmax = softmax(scaled_matmul, dim=-1)                      f32[3,2,5,5]
            matmul = matmul(softmax, permute_2)                           f32[3,2,5,4]
            permute_3 = permute(matmul, dims=(0, 2, 1, 3))                f32[3,5,2,4]
            reshape_3 = reshape(permute_3, shape=(-1, 5, 8))              f32[3,5,8]
            attention_out_proj = linear(reshape_3)                        f32[3,5,8]
            return attention_out_proj""",
        modified=True,
    )
    assert [node.target for node in found.nodes("linear")] == [
        f"attention.{name}_proj" for name in ("q", "k", "v", "out")
    ]
    assert found.nodes("linear")[0].meta["module_path"] == "attention.q_proj"
    assert not [name for name, _ in found.graph_module.named_parameters() if "in_proj" in name]


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"batch_first": False}, {"batch_first": False, "bias": False}],
    ids=str,
)
def test_multihead_attention_with(options: dict[str, Any]) -> None:
    found = decompose(Attention({"need_weights": False}, **options), tokens(), modified=True)
    assert found.operations["linear"] == 4


@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_size_of_multihead_attention_stays_free(batch_first: bool) -> None:
    model = Attention({"need_weights": False}, batch_first=batch_first)
    found = decompose(model, tokens(3, 5, 8) if batch_first else tokens(5, 3, 8))
    more = tokens(4, 5, 8) if batch_first else tokens(5, 4, 8)
    torch.testing.assert_close(found.graph_module(more).shape, more.shape)


def test_multihead_attention_between_sequences_of_other_widths() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=3, batch_first=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v, need_weights=False)[0]

    found = decompose(Cross(), tokens(2, 3, 8), tokens(2, 5, 6), tokens(2, 5, 3))
    assert found.operations["linear"] == 4


@pytest.mark.parametrize("average", [True, False])
def test_multihead_attention_gives_its_weights(average: bool) -> None:
    class Weights(Attention):
        def forward(self, x: Tensor) -> Any:
            y, weights = (self.attention(x, x, x, **self.call)[index] for index in (0, 1))
            return y, weights

    class Both(Attention):
        def forward(self, x: Tensor) -> Any:
            outputs = self.attention(x, x, x, **self.call)
            return outputs[0], outputs[1]

    found = decompose(Both({"average_attn_weights": average}), tokens(), modified=True)
    assert found.operations.get("mean", 0) == average


@pytest.mark.parametrize(
    ("call", "softmax"),
    [
        ({"attn_mask": CAUSAL}, "masked_softmax"),
        ({"attn_mask": CAUSAL, "is_causal": True}, "masked_softmax"),
        ({"attn_mask": CAUSAL < 0}, "masked_softmax"),
        ({"attn_mask": torch.randn(5, 5)}, "softmax"),
        ({"attn_mask": torch.rand(6, 5, 5) > 0.8}, "masked_softmax"),
        ({"attn_mask": torch.randn(6, 5, 5)}, "softmax"),
        ({"key_padding_mask": torch.eye(5)[:3] > 0}, "masked_softmax"),
        ({"key_padding_mask": torch.eye(5)[:3] > 0, "attn_mask": CAUSAL.T < 0}, "masked_softmax"),
    ],
    ids=["causal", "flag", "bool", "float", "3-d bool", "3-d float", "padding", "both"],
)
def test_masks_of_multihead_attention(call: dict[str, Any], softmax: str) -> None:
    found = decompose(Attention({"need_weights": False, **call}), tokens(), modified=True)
    assert found.operations.get(softmax) == 1
    assert "multiheadattention" not in found.operations


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_multihead_attention_that_are_inputs(kind: torch.dtype) -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.attention(x, x, x, need_weights=False, key_padding_mask=mask)[0]

    mask = (torch.eye(5)[:3]).to(kind)
    found = decompose(Masked(), tokens(), mask, modified=True)
    assert ("logical_not" in found.operations) == (kind is torch.bool)


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (Attention({"need_weights": False}), tokens(5, 8), "its input has no batch dim"),
        (
            Attention({"need_weights": False}, add_bias_kv=True),
            tokens(),
            "it appends a learned key and value (add_bias_kv)",
        ),
        (
            Attention({"need_weights": False}, add_zero_attn=True),
            tokens(),
            "it appends a key and value of zeros (add_zero_attn)",
        ),
        (Attention(), tokens(), "output reads its outputs as a tuple"),
    ],
    ids=["unbatched", "bias", "zeros", "tuple"],
)
def test_declines_multihead_attention(model: nn.Module, inputs: Tensor, reason: str) -> None:
    found = decompose(model, inputs, modified=False)
    assert found.reasons == (reason,)


def test_declines_a_module_that_is_called_twice() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> Any:
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.attention(x, x, x, need_weights=False)[0]

    assert decompose(Twice(), tokens()).reasons == ("it is called at 2 places",) * 2


# -- F.scaled_dot_product_attention and other single calls ---------------------------------


def test_dot_product_attention() -> None:
    decompose(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        *QKV,
        expect="""
            a = input                                               f32[2,2,3,4]
            b = input                                               f32[2,2,5,4]
            c = input                                               f32[2,2,5,6]
            transpose = transpose(b, dim0=-2, dim1=-1)              f32[2,2,4,5]
            scaled_matmul = scaled_matmul(a, transpose, scale=0.5)  f32[2,2,3,5]
            softmax = softmax(scaled_matmul, dim=-1)                f32[2,2,3,5]
            matmul = matmul(softmax, c)                             f32[2,2,3,6]
            return matmul""",
        modified=True,
    )


@pytest.mark.parametrize(
    ("options", "softmax"),
    [
        ({"scale": 0.3}, "softmax"),
        ({"is_causal": True}, "masked_softmax"),
        ({"attn_mask": torch.rand(3, 5) > 0.5}, "masked_softmax"),
        ({"attn_mask": torch.randn(2, 1, 3, 5)}, "softmax"),
    ],
    ids=["scale", "causal", "bool", "float"],
)
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_dot_product_attention_with(options: dict[str, Any], softmax: str, rank: int) -> None:
    q, k, v = (x[0] if rank == 3 else x.expand(2, *x.shape) if rank == 5 else x for x in QKV)
    mask = options.get("attn_mask")
    if mask is not None and mask.dim() > 2:
        mask = mask[0] if rank == 3 else mask

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, **{**options, **({} if mask is None else {"attn_mask": mask})}
        )

    found = decompose(forward, q, k, v, modified=True)
    assert found.operations.get(softmax) == 1


@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 3, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("hides", [True, False])
def test_grouped_heads_of_dot_product_attention(shape: tuple[int, ...], hides: bool) -> None:
    q, mask = torch.randn(2, 4, 3, 4), torch.randn(shape)
    mask = mask > -1 if hides else mask

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    found = decompose(forward, q, QKV[1], QKV[2], mask, modified=True)
    assert "scaled_dot_product_attention" not in found.operations


def test_declines_dropout_that_is_on() -> None:
    graph_module = float_graph(
        Inputs(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1))
    )
    verify.run_and_annotate(graph_module, QKV, name="dropout")
    result = DecomposeAttention().run(graph_module)
    assert not result.modified
    assert [decline.reason for decline in result.declines] == [
        "it drops at random (dropout_p is not 0)"
    ]


@pytest.mark.parametrize(
    ("equation", "shapes", "operations"),
    [
        ("bhid,bhjd->bhij", ((2, 2, 3, 4), (2, 2, 5, 4)), {"permute": 1, "matmul": 1}),
        ("B H I J, B H J D -> B H I D", ((2, 2, 3, 5), (2, 2, 5, 4)), {"matmul": 1}),
        ("bihd,bjhd->bhij", ((2, 3, 2, 4), (2, 5, 2, 4)), {"permute": 2, "matmul": 1}),
        ("bhij,bjhd->bihd", ((2, 2, 3, 5), (2, 5, 2, 4)), {"permute": 2, "matmul": 1}),
        ("bid,bjd->bji", ((2, 3, 4), (2, 5, 4)), {"permute": 1, "matmul": 1}),
        ("...id,...jd->...ij", ((2, 2, 3, 4), (2, 2, 5, 4)), {"permute": 1, "matmul": 1}),
        ("bcn,bcm->bnm", ((2, 4, 3), (2, 4, 5)), {"permute": 1, "matmul": 1}),
        ("bhwc,bhvc->bhwv", ((2, 3, 4, 5), (2, 3, 6, 5)), {"permute": 1, "matmul": 1}),
        ("bd,bjd->bj", ((2, 4), (2, 5, 4)), {"permute": 1, "reshape": 2, "matmul": 1}),
        ("bxyd,bjd->bxyj", ((2, 3, 2, 4), (2, 5, 4)), {"permute": 1, "reshape": 2, "matmul": 1}),
        ("bid,jd->bij", ((2, 3, 4), (5, 4)), {"permute": 1, "reshape": 2, "matmul": 1}),
    ],
)
def test_einsums_that_are_matrix_products(
    equation: str, shapes: tuple[tuple[int, ...], ...], operations: dict[str, int]
) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    found = decompose(lambda a, b: torch.einsum(equation, a, b), *inputs, modified=True)
    assert found.operations == operations


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("ii,ij->ij", ((3, 3), (3, 4)), "it takes a diagonal"),
        ("bi,bj->bij", ((2, 3), (2, 4)), "it sums over nothing"),
        ("bik,bj->bj", ((2, 3, 4), (2, 5)), "it sums over a dim that only one operand has"),
        ("bid,bjd", ((2, 3, 4), (2, 5, 4)), "its equation does not name the result"),
        ("bid,bjd->ij", ((2, 3, 4), (1, 5, 4)), "it broadcasts a dim"),
    ],
)
def test_declines_other_einsums(
    equation: str, shapes: tuple[tuple[int, ...], ...], reason: str
) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    found = decompose(lambda a, b: torch.einsum(equation, a, b), *inputs, modified=False)
    assert found.reasons == (reason,)


@pytest.mark.parametrize(
    ("options", "operations"),
    [
        ({}, {"matmul": 1, "add": 1}),
        ({"alpha": 0.5}, {"scaled_matmul": 1, "add": 1}),
        ({"beta": 2, "alpha": 0.5}, {"scaled_matmul": 1, "mul": 1, "add": 1}),
        ({"beta": 0, "alpha": 0.5}, {"scaled_matmul": 1}),
    ],
    ids=str,
)
def test_baddbmm(options: dict[str, Any], operations: dict[str, int]) -> None:
    inputs = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    found = decompose(lambda c, a, b: torch.baddbmm(c, a, b, **options), *inputs, modified=True)
    assert found.operations == operations
