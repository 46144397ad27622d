"""Channels are evened out before quantization: the same function, kinder ranges.

Each rewrite is a pass that is handed the ranges that it needs; `measured_rewrites` measures them.
"""

from fxquant.even_out.rewrites import MeasuredRewrite, measured_rewrites

__all__ = ["MeasuredRewrite", "measured_rewrites"]
