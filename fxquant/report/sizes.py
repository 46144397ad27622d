"""Sizes as reports write them."""

from __future__ import annotations

__all__ = ["written"]


def written(size: int) -> str:
    """A number of bytes: ``12.35 MB``, ``4.2 kB``."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
