"""Networks that a command may name: an unknown one is told before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

import torchvision

from fxquant.errors import nearest

TORCHVISION: list[str] = torchvision.models.list_models(module=torchvision.models)
"""The classification networks."""


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """What argparse takes as `type`: one of `names`; for any other it says the nearest."""

    def check(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"there is no network {name}{nearest(name, names)}")
        return name

    return check
