"""Lowering targets: integer graph → a graph of one target's kernels, checked against it."""

from fxquant.backends.check import TargetCheck, check_operations
from fxquant.backends.checked import Lowered, lower_checked
from fxquant.backends.choice import AUTO, candidates, compare_with_float, lower_fastest
from fxquant.backends.target import Execution, LoweredGraph, Target
from fxquant.backends.targets import TARGETS, available_targets, find_target

__all__ = [
    "AUTO",
    "TARGETS",
    "Execution",
    "Lowered",
    "LoweredGraph",
    "Target",
    "TargetCheck",
    "available_targets",
    "candidates",
    "check_operations",
    "compare_with_float",
    "find_target",
    "lower_checked",
    "lower_fastest",
]
