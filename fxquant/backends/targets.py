"""The table of targets."""

from __future__ import annotations

from fxquant.backends.native.target import Native
from fxquant.backends.reference.target import Reference
from fxquant.backends.target import Target
from fxquant.backends.x86.target import X86
from fxquant.errors import TargetError, nearest

__all__ = ["AUTO", "TARGETS", "available_targets", "find_target"]

AUTO = "auto"  # the fastest of them, see `choice`

_ALL: tuple[Target, ...] = (
    X86(),
    Native(),
    Reference(),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def available_targets() -> dict[str, str]:
    """Every target by name, with "" where this machine runs it, or the reason why it does not."""
    return {name: target.unavailable() for name, target in TARGETS.items()}


def find_target(name: str) -> Target:
    """The target of this name; raises TargetError for one that is unknown or unavailable."""
    if name not in TARGETS:
        names = (*TARGETS, AUTO)
        raise TargetError(
            f"unknown target {name!r}: known are {', '.join(names)}{nearest(name, names)}"
        )
    reason = TARGETS[name].unavailable()
    if reason:
        others = [other for other, why in available_targets().items() if not why]
        raise TargetError(
            f"target {name!r} is not available here: {reason}; available: {', '.join(others)}"
        )
    return TARGETS[name]
