"""What argparse reads from the text of an argument; ArgumentTypeError where it is nothing."""

from __future__ import annotations

import argparse

from fxquant.errors import nearest
from fxquant.measure.peers import PEERS

__all__ = ["peer_names", "points", "positive", "shape", "share", "size"]


def positive(text: str) -> int:
    """An integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def peer_names(text: str) -> tuple[str, ...]:
    """Names of `PEERS`: ``openvino,pt2e``."""
    names = tuple(text.split(","))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(
                f"there is no peer {name!r}, there are {', '.join(PEERS)}{nearest(name, PEERS)}"
            )
    return names


def size(text: str) -> float:
    """Bytes, as ``250000``, ``250kB`` or ``1.5MB``."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
    unit = next((unit for unit in units if text.endswith(unit)), "")
    value = float(text.removesuffix(unit)) * units.get(unit, 1)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of bytes")
    return value


def shape(text: str) -> tuple[int, ...]:
    """A shape: ``3,224,224``."""
    return tuple(positive(part) for part in text.split(","))


def share(text: str) -> float:
    """A number between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1 (95 % is 0.95)")
    return value


def points(text: str) -> float:
    """A number of percentage points."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100 percentage points")
    return value
