"""BRECQ: Li et al., Pushing the Limit of Post-Training Quantization by Block Reconstruction,
ICLR 2021.

Each block's output is held to the float block's: 20k iterations for the weights, then 5k for the
step sizes of the activations.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fxquant.reconstruct.method import PAPERS, Method

__all__ = ["Brecq"]


class Brecq(Method):
    """Block by block, weights first, step sizes after them."""

    published = replace(PAPERS, scale_learning_rate=4e-4, steps="after")
    published_depthwise = MappingProxyType({"regularizer": 0.1})
