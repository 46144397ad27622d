"""Lowering targets: integer graph → a graph of one target's kernels, checked against it."""

from fxquant.backends.check import TargetCheck, check_target
from fxquant.backends.checked import Lowered, lower_checked
from fxquant.backends.targets import TARGETS, lower

__all__ = ["TARGETS", "Lowered", "TargetCheck", "check_target", "lower", "lower_checked"]
