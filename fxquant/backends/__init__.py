"""Lowering targets: integer graph → a graph of one target's kernels, checked against it."""

from fxquant.backends.check import TargetCheck, check_operations
from fxquant.backends.checked import Lowered, lower_checked
from fxquant.backends.target import Execution, LoweredGraph, Target
from fxquant.backends.targets import TARGETS, available_targets, find_target

__all__ = [
    "TARGETS",
    "Execution",
    "Lowered",
    "LoweredGraph",
    "Target",
    "TargetCheck",
    "available_targets",
    "check_operations",
    "find_target",
    "lower_checked",
]
