"""Rewrites of torch.fx graphs: mechanism without an opinion about bits or scales."""

from passes.apply_rules import ApplyRules
from passes.assign_one_sided import AssignOneSided, OneSidedQuantizer
from passes.canonicalize import Canonicalize
from passes.eliminate_noops import EliminateNoops
from passes.fold_batch_norm import FoldBatchNorm
from passes.fuse_conv_bn_relu import FuseConvBnRelu
from passes.fused_layer import ACTIVATIONS, FUSIBLE_LAYERS, FusedLayer, add_relu
from passes.infer_ranges import InferRanges, Interval, is_non_negative, range_of
from passes.infra.base import Decline, Pass, PassResult, TensorInfo, module_path, tensor_info
from passes.infra.errors import (
    OrderError,
    PassError,
    UnsupportedGraphError,
    VerificationError,
)
from passes.infra.pattern import Call, Rule, RuleTable, call
from passes.infra.pipeline import PassRecord, Pipeline, copy_sharing_tensors
from passes.infra.rewrite import Rewriter
from passes.insert_quant_dequant import InsertQuantDequant, QuantizerSite
from passes.regions import InsideBlocks, Region, branching_regions, trunk
from passes.split_shared_modules import SplitSharedModules

__all__ = [
    "ACTIVATIONS",
    "FUSIBLE_LAYERS",
    "ApplyRules",
    "AssignOneSided",
    "Call",
    "Canonicalize",
    "Decline",
    "EliminateNoops",
    "FoldBatchNorm",
    "FuseConvBnRelu",
    "FusedLayer",
    "InferRanges",
    "InsertQuantDequant",
    "InsideBlocks",
    "Interval",
    "OneSidedQuantizer",
    "OrderError",
    "Pass",
    "PassError",
    "PassRecord",
    "PassResult",
    "Pipeline",
    "QuantizerSite",
    "Region",
    "Rewriter",
    "Rule",
    "RuleTable",
    "SplitSharedModules",
    "TensorInfo",
    "UnsupportedGraphError",
    "VerificationError",
    "add_relu",
    "branching_regions",
    "call",
    "copy_sharing_tensors",
    "is_non_negative",
    "module_path",
    "range_of",
    "tensor_info",
    "trunk",
]
