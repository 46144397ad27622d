"""Rounding beyond nearest: block by block against the float network."""

from fxquant.reconstruct.gptq import gptq
from fxquant.reconstruct.loop import find_blocks, reconstruct
from fxquant.reconstruct.method import find_method, granularity

__all__ = ["find_blocks", "find_method", "gptq", "granularity", "reconstruct"]
