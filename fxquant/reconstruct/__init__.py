"""Rounding beyond nearest: block by block against the float network."""

from fxquant.reconstruct.gptq import gptq
from fxquant.reconstruct.loop import find_blocks, reconstruct

__all__ = ["find_blocks", "gptq", "reconstruct"]
