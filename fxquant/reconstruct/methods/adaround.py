"""AdaRound: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020.

Each layer's output is held to the float layer's; the weights alone are learned.
"""

from __future__ import annotations

from dataclasses import replace

from fxquant.reconstruct.method import PAPERS, Method

__all__ = ["AdaRound"]


class AdaRound(Method):
    """Layer by layer, weights only."""

    published = replace(PAPERS, granularity="layer", iterations=10_000, steps="none")
