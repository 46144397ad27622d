"""Rewrites of the integer graph for kernels of one target: the same integers, fewer calls."""
