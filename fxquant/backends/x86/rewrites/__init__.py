"""Rewrites of the integer graph for the kernels of one target: the same integers, fewer calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxquant.backends.x86.rewrites.fold_channel_shuffle import FoldChannelShuffle
from fxquant.backends.x86.rewrites.merge_branches import MergeBranches
from fxquant.backends.x86.rewrites.pad_channels import PadChannels
from fxquant.errors import CompileError
from fxquant.to_integer.invariants import check_integer_graph
from passes import Pass, PassError, PassRecord, Pipeline
from passes.infra.pipeline import State

__all__ = ["PASSES", "FoldChannelShuffle", "MergeBranches", "PadChannels", "rewrite"]

PASSES: tuple[type[Pass], ...] = (MergeBranches, FoldChannelShuffle, PadChannels)

# Measured unit by unit on ShuffleNets of all widths and sizes of maps: weights of more channels
# leave the cache. Without AMX products with zeros are dear, and dearer still without AVX-512.
_MOST_CHANNELS = 768
_MOST_PRODUCTS = {"amx": 2**62, "avx512": 2**25, "avx2": 2**22}


def rewrite(
    integer: fx.GraphModule, example: Sequence[Any]
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """A copy of an annotated integer graph that yields the same integers with fewer calls.

    What remains of its values, and all that it returns, is equal to the bit. Running it on its
    own result changes nothing. The passes run in a pipeline, which verifies each on `example`:
    raises CompileError naming the one that broke its contract.
    """
    merge = MergeBranches(_MOST_CHANNELS, _MOST_PRODUCTS[_vectors()])
    steps = (merge, FoldChannelShuffle(), PadChannels())
    try:
        pipeline = Pipeline(steps, invariant=check_integer_graph)
        state, records = pipeline.go_on(State.copied(integer, example))
    except PassError as error:
        raise CompileError(f"integer graph for x86: {error}") from error
    return state.graph_module, tuple(records)


def _vectors() -> str:
    """The widest integer products of this CPU."""
    checks = {"amx": "_is_amx_tile_supported", "avx512": "_is_avx512_supported"}
    for name, check in checks.items():
        supported = getattr(torch.cpu, check, None)
        if supported is not None and supported():
            return name
    return "avx2"
