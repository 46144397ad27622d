"""Attention that divides after its product: a grid for each row of the probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from passes.attention.functions import masked_softmax, softmax_numerators, weighted_mean
from passes.decompose_attention import DecomposeAttention
from passes.infra.base import Decline, Pass, PassResult, tensor_info
from passes.infra.rewrite import Rewriter

__all__ = ["DeferSoftmaxDivision"]


class DeferSoftmaxDivision(Pass):
    """Divide by the sum of a softmax after the product with the values.

        before                          after
        p = softmax(s, dim=-1)          e = softmax_numerators(s)      exp(s − max s) ∈ [0, 1]
        y = matmul(p, v)                y = weighted_mean(e, v)        (e @ v) / Σ e

    On one grid for the tensor, a row whose attention is spread over 200 tokens has probabilities
    of two or three steps; its numerators reach the largest code in every row.

    `where(softmax)` says which. Declines where the probabilities are read by anything else, or
    stand behind the values.
    """

    exact = True
    after = (DecomposeAttention,)

    def __init__(self, where: Callable[[fx.Node], bool] = lambda node: True) -> None:
        self.where = where

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        declines = []
        for node in list(graph_module.graph.nodes):
            if node.target not in (F.softmax, masked_softmax) or not self.where(node):
                continue
            readers = list(node.users)
            products = [user for user in readers if user.target is torch.matmul]
            if not products or not _is_last(node):
                continue
            product = products[0]
            if len(readers) > 1:
                declines.append(Decline.at(node, f"is read by {len(readers)} operations"))
                continue
            if product.args[0] is not node:
                declines.append(Decline.at(node, f"is the second operand of {product.name}"))
                continue
            numerators = rewriter.replace_call(
                node, softmax_numerators, tuple(node.all_input_nodes)
            )
            rewriter.replace_call(product, weighted_mean, (numerators, product.args[1]))
        return PassResult(rewriter.finish(), tuple(declines))


def _is_last(node: fx.Node) -> bool:
    info = tensor_info(node)
    return info is not None and node.kwargs.get("dim") in (-1, len(info.shape) - 1)
