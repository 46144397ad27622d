"""Which passes make the float graph and the fused graph, and where a recipe lets them act."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxquant.plan.operations import layer_of
from fxquant.recipe import Recipe
from passes import InsideBlocks, Pass, add_relu, module_path
from passes.canonicalize import Canonicalize
from passes.decompose_attention import DecomposeAttention
from passes.decompose_operations import DecomposeOperations
from passes.defer_softmax_division import DeferSoftmaxDivision
from passes.eliminate_noops import EliminateNoops
from passes.fold_batch_norm import FoldBatchNorm
from passes.fold_constants import FoldConstants
from passes.fuse_conv_bn_relu import FuseConvBnRelu
from passes.infer_ranges import InferRanges
from passes.split_shared_modules import SplitSharedModules

__all__ = ["canonical_passes", "fusing_passes"]


def canonical_passes() -> list[Pass]:
    """From what was traced to the float graph: one spelling, explicit attention, no dead code."""
    return [
        Canonicalize(),
        SplitSharedModules(),
        EliminateNoops(),
        FoldConstants(),
        DecomposeAttention(),
        DecomposeOperations(),
    ]


def fusing_passes(recipe: Recipe) -> list[Pass]:
    """`fusion` says where batch norms are folded and activations and residuals are fused."""
    defer = DeferSoftmaxDivision(lambda node: _divides_behind(recipe, node))
    if recipe.fusion == "none":
        return [defer, InferRanges()]
    inside = InsideBlocks()

    def where(node: fx.Node) -> bool:
        return recipe.fusion in ("all", "two-step") or inside(node)

    def fusible(node: fx.Node) -> bool:
        # On integers alone, the sum of a residual and an accumulator has no form of its own.
        joins = node.target in (torch.add, add_relu)
        if joins and recipe.requantization == "dyadic":
            return False
        return where(node) and not _joins_linear(node)

    folding: list[Pass] = [FoldBatchNorm(where)] if recipe.fold_batch_norm else []
    fuse = FuseConvBnRelu(fusible, residual=recipe.fusion != "two-step")
    return [*folding, fuse, defer, InferRanges()]


def _divides_behind(recipe: Recipe, node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", ""))
    operations = recipe.operations_for(module_path(node), name)
    float_softmax = operations.softmax == "float" and recipe.requantization == "float"
    quantized = recipe.spec_for_output(module_path(node), name) is not None
    return float_softmax and quantized and operations.probabilities == "per_row"


def _joins_linear(node: fx.Node) -> bool:
    # A residual that a linear layer takes in would put a transformer's residual stream, which
    # needs more than 8 bits, on an 8-bit grid.
    if node.target not in (torch.add, add_relu):
        return False
    root = node.graph.owning_module
    assert root is not None
    return any(isinstance(layer_of(source, root), nn.Linear) for source in node.all_input_nodes)
