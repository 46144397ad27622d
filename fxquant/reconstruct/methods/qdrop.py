"""QDrop: Wei et al., Randomly Dropping Quantization for Extremely Low-bit Post-Training
Quantization, ICLR 2022.

As BRECQ, but weights and step sizes are learned jointly, and half of the activations stay float
in each iteration.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from fxquant.reconstruct.method import PAPERS, Method

__all__ = ["QDrop"]


class QDrop(Method):
    """Block by block; activations stay float at random."""

    published = replace(PAPERS, drop=0.5)
    published_depthwise = MappingProxyType({"regularizer": 0.1})
