"""What a value may be, and the end of the sentence that says so where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

__all__ = ["Check", "are_texts", "is_boolean", "is_text", "one_of", "within"]

Check = Callable[[object], str | None]
"""What is wrong with a value, as the end of a sentence, or None."""


def one_of(choices: Callable[[], Iterable[object]]) -> Check:
    """One of some values; they are looked at when a value is checked."""

    def check(value: object) -> str | None:
        known = list(choices())
        # True == 1 in Python; a recipe that says bits = true is a mistake.
        if any(value == other and type(value) is type(other) for other in known):
            return None
        shown = [json.dumps(other) for other in known]
        return f"must be {', '.join(shown[:-1])} or {shown[-1]}"

    return check


def within(low: float, high: float, *, integer: bool) -> Check:
    """A number between two bounds, both included."""
    article = "an integer" if integer else "a number"
    bounds = f"{_shown(low)} to {_shown(high)}"

    def check(value: object) -> str | None:
        number = isinstance(value, int if integer else (int, float))
        right = number and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
        return None if right else f"must be {article} from {bounds}"

    return check


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def is_boolean(value: object) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "must be true or false"


def is_text(value: object) -> str | None:
    """A text."""
    return None if isinstance(value, str) else "must be a text"


def are_texts(value: object) -> str | None:
    """A list of texts."""
    right = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    return None if right else "must be a list of texts"
