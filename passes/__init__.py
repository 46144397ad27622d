"""Rewrites of torch.fx graphs: mechanism without an opinion about bits or scales."""

from passes.assign_one_sided import AssignOneSided, OneSidedQuantizer
from passes.attention.functions import (
    masked_softmax,
    scaled_matmul,
    softmax_numerators,
    weighted_mean,
)
from passes.blocks.partition import Block, format_tree, partition_blocks
from passes.blocks.trunk import InsideBlocks, trunk
from passes.canonicalize import Canonicalize
from passes.decompose_attention import DecomposeAttention
from passes.defer_softmax_division import DeferSoftmaxDivision
from passes.eliminate_noops import EliminateNoops
from passes.fold_batch_norm import FoldBatchNorm
from passes.fold_constants import FoldConstants
from passes.fuse_conv_bn_relu import FuseConvBnRelu
from passes.infer_ranges import InferRanges, Interval, is_non_negative, range_of
from passes.infra.base import Decline, Pass, PassResult, TensorInfo, module_path, tensor_info
from passes.infra.copies import copy_sharing_tensors
from passes.infra.errors import (
    OrderError,
    PassError,
    UnsupportedGraphError,
    VerificationError,
)
from passes.infra.pipeline import PassRecord, Pipeline
from passes.infra.rewrite import Rewriter
from passes.infra.stored import is_plain, overrides_forward
from passes.insert_quant_dequant import InsertQuantDequant, QuantizerSite
from passes.layers.fused_layer import (
    ACTIVATIONS,
    FUSIBLE_LAYERS,
    FusedLayer,
    add_relu,
    is_depthwise,
)
from passes.replace_integer_ops import ReplaceIntegerOps
from passes.split_shared_modules import SplitSharedModules

__all__ = [
    "ACTIVATIONS",
    "FUSIBLE_LAYERS",
    "AssignOneSided",
    "Block",
    "Canonicalize",
    "Decline",
    "DecomposeAttention",
    "DeferSoftmaxDivision",
    "EliminateNoops",
    "FoldBatchNorm",
    "FoldConstants",
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
    "ReplaceIntegerOps",
    "Rewriter",
    "SplitSharedModules",
    "TensorInfo",
    "UnsupportedGraphError",
    "VerificationError",
    "add_relu",
    "copy_sharing_tensors",
    "format_tree",
    "is_depthwise",
    "is_non_negative",
    "is_plain",
    "masked_softmax",
    "module_path",
    "overrides_forward",
    "partition_blocks",
    "range_of",
    "scaled_matmul",
    "softmax_numerators",
    "tensor_info",
    "trunk",
    "weighted_mean",
]
