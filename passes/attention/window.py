"""torchvision's functions for Swin: attention in shifted windows, and merging of patches."""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.attention.masks import Masks, attend, soften
from passes.infra.base import shape_of
from passes.infra.expansion import Expansion
from passes.infra.rewrite import Rewriter
from passes.infra.stored import constant_value, get_tensor
from passes.layers.replace import make_linear

__all__ = ["expand_patch_merging_pad", "expand_window_attention", "is_torchvision_swin"]


def is_torchvision_swin(node: fx.Node, name: str) -> bool:
    """Whether `node` calls the function `name` of torchvision's Swin, known by name alone."""
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == name
        and getattr(node.target, "__module__", "") == "torchvision.models.swin_transformer"
    )


def expand_window_attention(rewriter: Rewriter, node: fx.Node) -> str | None:
    """Make torchvision's `shifted_window_attention` explicit; the reason where that cannot be.

    The map [N, H, W, C] is padded to whole windows, rolled, cut into windows [N·windows, T, C]
    (with a shift [N, windows, T, C], because each window has its own mask), and put together
    again. Sizes other than the batch's are those of the probe. torchvision hides the positions
    of other regions by adding −100 to their scores; here they take no part.
    Source: Liu et al. 2021 (Swin) and 2022 (Swin V2: cosine attention with learned scales).
    """
    call = _bind(node)
    if isinstance(call, str):
        return call
    reason = _why_not(call)
    if reason:
        return reason
    expansion = Expansion(rewriter, node, path=node.meta.get("module_path") or node.name)
    x = call["input"]
    shape = shape_of(x)
    assert shape is not None
    _, height, width, channels = shape
    window = tuple(call["window_size"])
    padding = [-size % step for size, step in zip((height, width), window, strict=True)]
    padded = (height + padding[0], width + padding[1])
    # A window that covers the whole axis is not shifted along it.
    shift = [
        0 if step >= size else amount
        for amount, step, size in zip(call["shift_size"], window, padded, strict=True)
    ]
    shifted = sum(shift) > 0
    x = expansion.pad(x, 0, 0, 0, padding[1], 0, padding[0])
    if shifted:
        x = expansion.call(torch.roll, x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    grid = (padded[0] // window[0], padded[1] // window[1])
    lead = (-1, grid[0] * grid[1]) if shifted else (-1,)
    x = expansion.reshape(x, -1, grid[0], window[0], grid[1], window[1], channels)
    x = expansion.permute(x, 0, 1, 3, 2, 4, 5)
    x = expansion.reshape(x, *lead, window[0] * window[1], channels)

    masks = Masks()
    if shifted:
        masks.allowed.append(_same_region(padded, window, shift))
    x = _attention(expansion, call, x, (*lead, window[0] * window[1]), channels, masks)

    x = expansion.reshape(x, -1, *grid, *window, channels)
    x = expansion.permute(x, 0, 1, 3, 2, 4, 5)
    x = expansion.reshape(x, -1, *padded, channels)
    if shifted:
        x = expansion.call(torch.roll, x, shifts=tuple(shift), dims=(1, 2))
    if any(padding):
        cut = (slice(None), slice(None, height), slice(None, width), slice(None))
        x = expansion.call(operator.getitem, x, cut)
    expansion.finish(x)
    return None


def expand_patch_merging_pad(rewriter: Rewriter, node: fx.Node) -> str | None:
    """The 2×2 neighbours of a map [..., H, W, C] as 4C channels; the reason where not."""
    call = _bind(node)
    if isinstance(call, str):
        return call
    x = call["x"]
    shape = shape_of(x)
    if shape is None:
        return "the shape of its input is not known"
    expansion = Expansion(rewriter, node)
    x = expansion.pad(x, 0, 0, 0, shape[-2] % 2, 0, shape[-3] % 2)
    parts = [
        expansion.call(
            operator.getitem,
            x,
            (..., slice(row, None, 2), slice(column, None, 2), slice(None)),
        )
        for column in (0, 1)
        for row in (0, 1)
    ]
    expansion.finish(expansion.call(torch.cat, parts, dim=-1))
    return None


def _bind(node: fx.Node) -> dict[str, Any] | str:
    assert callable(node.target)
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except TypeError as error:
        return f"its call cannot be bound: {error}"
    given.apply_defaults()
    return given.arguments


def _why_not(call: dict[str, Any]) -> str | None:
    shape = shape_of(call["input"])
    if shape is None or len(shape) != 4:
        return "the shape of its input is not known"
    for name in ("qkv_weight", "proj_weight", "qkv_bias", "proj_bias", "logit_scale"):
        if call[name] is not None and constant_value(call[name]) is None:
            return f"its {name} is computed while the model runs"
    if call["training"] and (call["attention_dropout"] or call["dropout"]):
        return "it drops at random"
    numbers = (*call["window_size"], *call["shift_size"], call["num_heads"])
    if not all(isinstance(number, int) for number in numbers):
        return "its sizes are computed while the model runs"
    return None


def _attention(
    expansion: Expansion,
    call: dict[str, Any],
    x: fx.Node,
    lead: tuple[int, ...],
    channels: int,
    masks: Masks,
) -> fx.Node:
    """Attention within each window: x of shape (*lead, channels), as the result."""
    heads = call["num_heads"]
    size = channels // heads
    cosine = call["logit_scale"] is not None
    layers = _projections(expansion, call, cosine)
    batch = tuple(range(len(lead) - 1))
    token, head, feature = len(lead) - 1, len(lead), len(lead) + 1
    split = []
    for name, layer in layers.items():
        y = expansion.reshape(expansion.linear(f"{name}_proj", layer, x), *lead, heads, size)
        order = (feature, token) if name == "k" else (token, feature)
        split.append(expansion.permute(y, *batch, head, *order))
    q, k, v = split
    bias = call["relative_position_bias"]
    if cosine:
        q, k = (
            expansion.call(F.normalize, y, p=2.0, dim=dim, eps=1e-12)
            for y, dim in ((q, -1), (k, -2))
        )
        logit_scale = constant_value(call["logit_scale"])
        assert logit_scale is not None
        factor = torch.clamp(logit_scale, max=math.log(100.0)).exp()
        scores = expansion.call(torch.matmul, q, k)
        scores = expansion.call(torch.mul, scores, expansion.constant("logit_factor", factor))
        scores = expansion.call(torch.add, scores, bias)
        mixed = expansion.call(torch.matmul, soften(expansion, scores, masks.allowed), v)
    else:
        masks.added.append(bias)
        mixed, _ = attend(expansion, q, k, v, scale=float(size) ** -0.5, masks=masks)
    y = expansion.permute(mixed, *batch, head, token, feature)
    y = expansion.reshape(y, *lead, channels)
    weight = _stored(expansion, call["proj_weight"])
    projection = make_linear(weight, _stored(expansion, call["proj_bias"]))
    return expansion.linear("proj", projection, y)


def _projections(expansion: Expansion, call: dict[str, Any], cosine: bool) -> dict[str, nn.Linear]:
    weights = torch.chunk(_stored(expansion, call["qkv_weight"]), 3)
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if call["qkv_bias"] is not None:
        biases = torch.chunk(_stored(expansion, call["qkv_bias"]), 3)
        if cosine:
            # Swin V2 takes the bias of the keys for zero, whatever is stored.
            biases = (biases[0], None, biases[2])
    return {
        name: make_linear(weight, bias)
        for name, weight, bias in zip(("q", "k", "v"), weights, biases, strict=True)
    }


def _stored(expansion: Expansion, node: fx.Node | None) -> Any:
    if node is None:
        return None
    return get_tensor(expansion.rewriter.graph_module, str(node.target))


def _same_region(size: tuple[int, int], window: tuple[int, ...], shift: list[int]) -> Tensor:
    """Bool [windows, 1, T, T]: whether two places of a rolled map were neighbours before.

    Rolling brings the first rows behind the last: of the last window, the `shift` last rows come
    from elsewhere. Rows before the last window get 0, those of it 1 and 2; columns alike.
    """
    labels = []
    for length, step, amount in zip(size, window, shift, strict=True):
        label = torch.zeros(length, dtype=torch.int64)
        if amount:
            label[-step:-amount] = 1
            label[-amount:] = 2
        labels.append(label)
    regions = labels[0][:, None] * 3 + labels[1]
    cut = regions.reshape(size[0] // window[0], window[0], size[1] // window[1], window[1])
    cut = cut.permute(0, 2, 1, 3).reshape(-1, 1, window[0] * window[1])
    return cut.unsqueeze(-1) == cut.unsqueeze(-2)
