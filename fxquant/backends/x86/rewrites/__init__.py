"""Rewrites of the integer graph for the kernels of one target: the same integers, fewer calls."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.backends.x86.rewrites.fold_channel_shuffle import FoldChannelShuffle
from fxquant.backends.x86.rewrites.merge_branches import MergeBranches
from fxquant.backends.x86.rewrites.pad_channels import PadChannels
from passes import copy_sharing_tensors

__all__ = ["FoldChannelShuffle", "MergeBranches", "PadChannels", "rewrite_for_x86"]

# Measured unit by unit on ShuffleNets of all widths and sizes of maps: weights of more channels
# leave the cache. Without AMX products with zeros are dear, and dearer still without AVX-512.
_MOST_CHANNELS = 768
_MOST_PRODUCTS = {"amx": 2**62, "avx512": 2**25, "avx2": 2**22}


def rewrite_for_x86(integer: fx.GraphModule) -> fx.GraphModule:
    """A copy of an annotated integer graph that yields the same integers with fewer calls.

    What remains of its values, and all that it returns, is equal to the bit. Running it on its
    own result changes nothing.
    """
    rewritten = copy_sharing_tensors(integer)
    merge = MergeBranches(_MOST_CHANNELS, _MOST_PRODUCTS[_vectors()])
    for step in (merge, FoldChannelShuffle(), PadChannels()):
        step.run(rewritten)
    return rewritten


def _vectors() -> str:
    """The widest integer products of this CPU."""
    checks = {"amx": "_is_amx_tile_supported", "avx512": "_is_avx512_supported"}
    for name, check in checks.items():
        supported = getattr(torch.cpu, check, None)
        if supported is not None and supported():
            return name
    return "avx2"
