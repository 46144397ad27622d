"""Interval analysis: which values are provably bounded or non-negative, and why."""

from __future__ import annotations

import math

from torch import Tensor, fx, nn

from passes.canonicalize import Canonicalize
from passes.fold_batch_norm import FoldBatchNorm
from passes.fuse_conv_bn_relu import FuseConvBnRelu
from passes.infra.base import Pass, PassResult
from passes.infra.stored import get_tensor, is_plain, module_of
from passes.layers.fused_layer import FusedLayer
from passes.ranges.intervals import UNBOUNDED, Interval
from passes.ranges.operands import range_of
from passes.ranges.rules import RULES

__all__ = ["InferRanges", "Interval", "is_non_negative", "range_of"]


class InferRanges(Pass):
    """Bound every tensor by what made it, in ``node.meta["range"]``.

        y = relu(x)            y ∈ [0, ∞)     relu
        z = max_pool2d(y)      z ∈ [0, ∞)     max_pool2d of relu
        s = sigmoid(x)         s ∈ [0, 1]     sigmoid ⊂ [0, 1]
        p = mul(z, s)          p ∈ [0, ∞)     product of non-negatives
        c = cat((y, y))        c ∈ [0, ∞)     cat of relu, relu

    The graph stays as it is. Nothing is assumed about inputs, and nothing is known of the sums
    in a layer. A node that yields several tensors has one interval that holds for all of them.
    The notes list each value that is proven non-negative, with its proof.
    """

    exact = True
    after = (Canonicalize, FoldBatchNorm, FuseConvBnRelu)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Visit every node once, in execution order; what an earlier run found is found anew."""
        annotated = any("tensor" in node.meta for node in graph_module.graph.nodes)
        notes = []
        for node in graph_module.graph.nodes:
            node.meta.pop("range", None)
            if node.op == "output" or (annotated and "tensor" not in node.meta):
                continue
            found = node.meta["range"] = _infer(node, graph_module)
            if found.non_negative:
                notes.append(f"{node.name} in {found}: {found.proof}")
        return PassResult(modified=False, notes=tuple(notes))


def is_non_negative(node: fx.Node) -> bool:
    """Whether `InferRanges` proved that no element of the node's value is below zero."""
    return range_of(node).non_negative


def _infer(node: fx.Node, root: nn.Module) -> Interval:
    if node.op == "get_attr":
        try:
            return _constant(get_tensor(root, str(node.target)))
        except AttributeError:
            return UNBOUNDED
    if node.op == "call_module":
        return _module(module_of(node))
    rule = RULES.get(node.target) if node.op in ("call_function", "call_method") else None
    return rule(node) if rule is not None and node.args else UNBOUNDED


def _constant(value: Tensor) -> Interval:
    if value.is_complex() or value.is_quantized or value.numel() == 0:
        return UNBOUNDED
    low, high = (float(bound) for bound in value.detach().aminmax())
    return UNBOUNDED if math.isnan(low + high) else Interval(low, high, "constant")


def _module(module: nn.Module | None) -> Interval:
    if isinstance(module, FusedLayer) and module.activation == "relu":
        return Interval(0.0, math.inf, "relu")
    if isinstance(module, FusedLayer) and module.activation == "relu6":
        return Interval(0.0, 6.0, "relu6 ⊂ [0, 6]")
    if is_plain(module, nn.Embedding) and module.max_norm is None:
        return _constant(module.weight)
    return UNBOUNDED
