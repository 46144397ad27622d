"""Attention as the projections, products and softmax that it is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.attention.dot_product import expand_baddbmm, expand_dot_product_attention
from passes.attention.einsum import expand_einsum
from passes.attention.factors import fold_factors
from passes.attention.mask_patterns import recognize_masks
from passes.attention.multihead import expand_multihead_attention
from passes.attention.window import (
    expand_patch_merging_pad,
    expand_window_attention,
    is_torchvision_swin,
)
from passes.canonical.plain_values import PlainValues
from passes.canonicalize import Canonicalize
from passes.eliminate_noops import EliminateNoops
from passes.fold_constants import FoldConstants
from passes.infra.base import Decline, Pass, PassResult, tensor_info
from passes.infra.rewrite import Rewriter
from passes.infra.stored import call_sites, drop_unread, is_plain, module_of, stored_reads
from passes.split_shared_modules import SplitSharedModules

__all__ = ["DecomposeAttention"]


class DecomposeAttention(Pass):
    """Make attention explicit, so that each of its values can have a quantizer of its own.

        before                                        after
        y, _ = attention(x, x, x)                     q, k, v = q_proj(x), k_proj(x), v_proj(x)
          (nn.MultiheadAttention)                     … reshape and permute: [N, heads, T, d] …
                                                      s = scaled_matmul(q, k, scale=1/√d)
                                                      y = out_proj(… matmul(softmax(s), v) …)
        s = (q * 0.125) @ k                           s = scaled_matmul(q, k, scale=0.125)
        p = softmax(s.masked_fill(m, -inf), dim=-1)   p = masked_softmax(s, ~m, dim=-1)

    Acts on `nn.MultiheadAttention`, `F.scaled_dot_product_attention`, torchvision's windowed
    attention and patch merging of Swin, einsums that are matrix products, `torch.baddbmm`, and
    attention written out by hand. Sizes other than the batch's become those of the probe.

    Declines, with the reason, where a call has no such form: appended keys, tuples that are read
    as a whole, dropout that is on, operands that are not known.
    """

    exact = True
    after = (Canonicalize, SplitSharedModules, EliminateNoops, FoldConstants)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        reads = stored_reads(graph_module)
        sites = call_sites(graph_module.graph)
        declines = []
        for node in list(graph_module.graph.nodes):
            reason = _expand(rewriter, node, sites)
            if reason:
                declines.append(Decline.at(node, reason))
        declines += fold_factors(rewriter, PlainValues(graph_module))
        declines += recognize_masks(rewriter)
        modified = rewriter.finish()
        if modified:
            drop_unread(graph_module, reads)
        return PassResult(modified, tuple(declines))


def _expand(rewriter: Rewriter, node: fx.Node, sites: dict[str, int]) -> str | None:
    """Write out what `node` does, where it is a call that holds attention."""
    module = module_of(node)
    if is_plain(module, nn.MultiheadAttention):
        return expand_multihead_attention(rewriter, node, module, sites)
    if node.op != "call_function":
        return None
    if node.target is getattr and node.args[1] == "mT" and tensor_info(node) is not None:
        rewriter.replace_call(node, torch.transpose, node.args[:1], {"dim0": -2, "dim1": -1})
        return None
    if node.target is F.scaled_dot_product_attention:
        return expand_dot_product_attention(rewriter, node)
    if node.target is torch.einsum:
        return expand_einsum(rewriter, node)
    if node.target is torch.baddbmm:
        return expand_baddbmm(rewriter, node)
    if is_torchvision_swin(node, "shifted_window_attention"):
        return expand_window_attention(rewriter, node)
    if is_torchvision_swin(node, "_patch_merging_pad"):
        return expand_patch_merging_pad(rewriter, node)
    return None
