"""Products written as one call: `F.scaled_dot_product_attention`, `torch.baddbmm`, einsum."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.attention.functions import scaled_matmul
from passes.attention.masks import Masks, attend, causal_mask
from passes.infra.base import shape_of, tensor_info
from passes.infra.expansion import Expansion
from passes.infra.rewrite import Rewriter

__all__ = ["expand_baddbmm", "expand_dot_product_attention"]

# The function is a builtin: it has no signature that could be asked.
_DEFAULTS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def expand_dot_product_attention(rewriter: Rewriter, node: fx.Node) -> str | None:
    """Make `F.scaled_dot_product_attention` explicit; the reason where that cannot be.

    With fewer heads in key and value than in the query (`enable_gqa`), the query's heads are
    grouped by the one that they read: [N, G, heads/G, T, d] against [N, G, 1, d, S].
    """
    call = {**_DEFAULTS, **dict(zip(_DEFAULTS, node.args, strict=False)), **node.kwargs}
    q, k, v = call["query"], call["key"], call["value"]
    shapes = [shape_of(x) for x in (q, k, v)]
    if any(shape is None or len(shape) < 3 for shape in shapes):
        return "its inputs are not known to have three or more dims"
    queries, keys = shapes[0] or (), shapes[1] or ()
    if call["dropout_p"] != 0:
        return "it drops at random (dropout_p is not 0)"
    if isinstance(call["is_causal"], fx.Node) or isinstance(call["enable_gqa"], fx.Node):
        return "its flags are computed while the model runs"
    scale = queries[-1] ** -0.5 if call["scale"] is None else call["scale"]
    if not isinstance(scale, (int, float)):
        return "its scale is computed while the model runs"
    mask = call["attn_mask"]
    if mask is not None and tensor_info(mask) is None:
        return "the type of its attn_mask is not known"
    grouped = bool(call["enable_gqa"]) and queries[-3] != keys[-3]
    if grouped and (len(queries) != 4 or len(shape_of(mask) or (0, 0)) not in (2, 4)):
        return "its grouped heads have another rank than 4"

    expansion = Expansion(rewriter, node)
    mask_shape = None
    if grouped:
        groups = (keys[-3], queries[-3] // keys[-3])
        q = expansion.reshape(q, -1, *groups, *queries[-2:])
        k, v = (expansion.call(torch.unsqueeze, x, dim=-3) for x in (k, v))
        shape = shape_of(mask) or ()
        if len(shape) == 4:
            mask_shape = (-1, *((1, 1) if shape[1] == 1 else groups), *shape[2:])
    masks = Masks()
    if call["is_causal"]:
        masks.allowed.append(causal_mask(queries[-2], keys[-2]))
    if mask is not None:
        masks.add(expansion, mask, shape=mask_shape)
    k = expansion.call(torch.transpose, k, dim0=-2, dim1=-1)
    result, _ = attend(expansion, q, k, v, scale=float(scale), masks=masks)
    if grouped:
        result = expansion.reshape(result, -1, queries[-3], queries[-2], (shapes[2] or ())[-1])
    expansion.finish(result)
    return None


def expand_baddbmm(rewriter: Rewriter, node: fx.Node) -> str | None:
    """``beta·input + alpha·(a @ b)`` as a product and a sum; the reason where that cannot be."""
    names = ("input", "batch1", "batch2")
    call: dict[str, Any] = {
        "beta": 1,
        "alpha": 1,
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    beta, alpha = call["beta"], call["alpha"]
    if len(node.args) > 3 or not all(isinstance(x, (int, float)) for x in (beta, alpha)):
        return "its factors are computed while the model runs"
    expansion = Expansion(rewriter, node)
    a, b = call["batch1"], call["batch2"]
    if alpha == 1:
        result = expansion.call(torch.matmul, a, b)
    else:
        result = expansion.call(scaled_matmul, a, b, scale=float(alpha))
    # With beta 0, torch does not even read the input, which may hold NaN.
    if beta != 0:
        term = call["input"] if beta == 1 else expansion.call(torch.mul, call["input"], beta)
        result = expansion.call(torch.add, result, term)
    expansion.finish(result)
    return None
