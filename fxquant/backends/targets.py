"""The table of targets, and the step from an integer graph to one of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxquant.backends.reference.lower import lower_reference
from fxquant.backends.x86.lower import lower_x86
from fxquant.errors import TargetError, nearest

__all__ = ["TARGETS", "lower"]

TARGETS: dict[str, Callable[[fx.GraphModule, frozenset[str]], fx.GraphModule]] = {
    "reference": lower_reference,
    "x86": lower_x86,
}


def lower(
    integer: fx.GraphModule, target: str, keep: frozenset[str] = frozenset()
) -> fx.GraphModule:
    """The graph of `target` for an integer graph; raises TargetError for an unknown one.

    The nodes named in `keep` keep their reference operator.
    """
    if target not in TARGETS:
        raise TargetError(
            f"unknown target {target!r}: known are {', '.join(TARGETS)}{nearest(target, TARGETS)}"
        )
    return TARGETS[target](integer, keep)
