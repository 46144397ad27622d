"""Rounding beyond nearest: block by block against the float network."""

from fxquant.reconstruct.gptq import gptq
from fxquant.reconstruct.loop import reconstruct

__all__ = ["gptq", "reconstruct"]
