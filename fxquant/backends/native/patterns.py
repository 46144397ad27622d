"""Operations of the integer graph that one kernel computes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxquant.kernels.calls import operator_arguments
from passes import softmax_numerators

__all__ = ["Attention", "find_attention", "gelu_behind"]

OPS: Any = torch.ops.fxquant
_MOST_KEYS, _MOST_CHANNELS, _MOST_PRODUCTS = 1024, 128, 65536


@dataclass(frozen=True, eq=False)
class Attention:
    """The nodes in front of a weighted mean that its kernel computes as well."""

    scores: fx.Node
    numerators: fx.Node
    quantize: fx.Node

    @property
    def inside(self) -> tuple[fx.Node, ...]:
        """In the order of the graph."""
        return (self.scores, self.numerators, self.quantize)


def find_attention(mean: fx.Node, shapes: Any) -> Attention | None:
    """What a weighted mean's kernel takes in: each read by the next one alone."""
    arguments = operator_arguments(mean)
    quantize = arguments["a"]
    if arguments["dtype"] != torch.uint8 or not _alone(quantize, OPS.quantize.default):
        return None
    codes = operator_arguments(quantize)
    if (codes["zero_point"], codes["qmin"], codes["qmax"]) != (0, 0, 255):
        return None
    numerators = codes["x"]
    if codes["dtype"] != torch.uint8 or not _alone(numerators, softmax_numerators):
        return None
    if len(numerators.all_input_nodes) != 1:
        return None
    scores = numerators.args[0]
    if not _alone(scores, OPS.matmul.default):
        return None
    product = operator_arguments(scores)
    q, k, v = (shapes[n] for n in (product["a"], product["b"], arguments["b"]))
    if product["dtype"] != torch.float32 or {q.dtype, k.dtype, v.dtype} != {torch.uint8}:
        return None
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] or q.dim() < 3:
        return None
    columns, depth, width = k.shape[-1], k.shape[-2], v.shape[-1]
    products = max(-(-columns // 64) * 64 * depth, columns * width)
    if columns > _MOST_KEYS or max(depth, width) > _MOST_CHANNELS or products > _MOST_PRODUCTS:
        return None
    reach = 255 * abs(arguments["b_scale"] / arguments["scale"])
    return Attention(scores, numerators, quantize) if reach < 2**30 else None


def _alone(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1


def gelu_behind(layer: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """GELU and the quantizer that alone read a layer's floats."""
    if len(layer.users) != 1:
        return None
    (gelu,) = layer.users
    if gelu.target is not F.gelu or len(gelu.users) != 1:
        return None
    (quantize,) = gelu.users
    if gelu.kwargs.get("approximate", "none") != "none" or len(gelu.args) != 1:
        return None
    if quantize.target is not OPS.quantize.default:
        return None
    is_byte = operator_arguments(quantize)["dtype"] == torch.uint8
    return (gelu, quantize) if is_byte else None
