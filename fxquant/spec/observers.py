"""The range estimators that a spec may name, and their options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fxquant.errors import RecipeError, nearest

__all__ = ["OBSERVERS", "ObserverOption", "Options", "check_options", "split_observer"]

Options = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ObserverOption:
    """One parameter of a range estimator: its default, its bounds, and what it means."""

    default: float
    low: float
    high: float
    meaning: str
    integer: bool = False
    power_of_two: bool = False

    def complaint(self, value: object) -> str | None:
        """What is wrong with a value, as the end of a sentence, or None."""
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            return f"must be {'an integer' if self.integer else 'a number'}, got {value!r}"
        if not self.low <= value <= self.high:
            return f"must lie between {self.low:g} and {self.high:g}, got {value!r}"
        if self.power_of_two and int(value) & (int(value) - 1):
            return f"must be a power of two, got {value!r}"
        return None


_MOMENTUM = ObserverOption(0.9, 0.0, 0.9999, "share of the running range that a batch keeps")
_BINS = ObserverOption(4096, 256, 65536, "bins of the histogram", integer=True, power_of_two=True)
_CANDIDATES = ObserverOption(100, 4, 1000, "ranges compared before refinement", integer=True)
_PERCENTILE = ObserverOption(99.99, 50.0, 100.0, "percentage of the values at or below the bound")
_CAP = ObserverOption(
    1.75,
    0.0,
    1000.0,
    "how many mean extremes of an image a range may span where more is rare; 0 lifts it",
)
_P = ObserverOption(2.4, 0.1, 16.0, "exponent of the error norm")

OBSERVERS: Mapping[str, Mapping[str, ObserverOption]] = MappingProxyType(
    {
        "abs_max": {},
        "min_max": {},
        "moving_average_abs_max": {"momentum": _MOMENTUM},
        "moving_average_min_max": {"momentum": _MOMENTUM},
        "histogram": {"bins": _BINS, "candidates": _CANDIDATES, "cap": _CAP},
        "percentile": {"bins": _BINS, "percentile": _PERCENTILE},
        "entropy": {"bins": _BINS, "candidates": _CANDIDATES},
        "mse": {"bins": _BINS, "candidates": _CANDIDATES, "cap": _CAP},
        "p_norm": {"bins": _BINS, "candidates": _CANDIDATES, "cap": _CAP, "p": _P},
    }
)
"""Every range estimator and its options. ``p_norm_2.4`` is short for ``p_norm`` with p = 2.4."""


def split_observer(name: str) -> tuple[str, Options]:
    """The estimator and the options that a name stands for: ``p_norm_2.4`` is (p_norm, p = 2.4).

    Raises:
        RecipeError: no estimator has this name.
    """
    shorthand = re.fullmatch(r"p_norm_(\d+(?:\.\d+)?)", name)
    if shorthand:
        return "p_norm", (("p", float(shorthand[1])),)
    if name not in OBSERVERS:
        hint = nearest(name, OBSERVERS) or f"; known are {', '.join(OBSERVERS)}, p_norm_2.4"
        raise RecipeError(f"unknown observer {name!r}{hint}")
    return name, ()


def check_options(observer: str, options: Mapping[str, object], where: str = "options") -> None:
    """Refuse an option that the estimator does not have, or a value outside its bounds.

    Raises:
        RecipeError: names the option, where it stands and what would be right.
    """
    base, implied = split_observer(observer)
    known = OBSERVERS[base]
    for name, value in [*implied, *options.items()]:
        if name not in known:
            hint = nearest(name, known) or f"; it knows {', '.join(known) or 'none'}"
            raise RecipeError(f"{where}: observer {observer!r} has no option {name!r}{hint}")
        complaint = known[name].complaint(value)
        if complaint:
            raise RecipeError(f"{where}.{name} {complaint}")
    for name, value in implied:
        if name in options:
            raise RecipeError(f"{where}.{name}: {observer!r} already says {name} = {value:g}")
