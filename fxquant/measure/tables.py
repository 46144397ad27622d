"""How figures are written: as cells of a table, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

__all__ = ["decibels", "finite", "percent", "table"]


def percent(share: float | None) -> str:
    """``0.7954`` as ``79.54 %``; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f} %"


def decibels(ratio: float | None) -> str:
    """``17.42`` as ``17.4 dB``; a dash for None."""
    return "-" if ratio is None else f"{ratio:.1f} dB"


def finite(data: Any) -> Any:
    """The same data with None for infinities and NaN, which JSON does not have."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str], *, texts: int = 1) -> str:
    """Rows of cells as they are: the first `texts` columns on the left, figures on the right."""
    return tabulate(
        list(rows),
        headers=headers,
        disable_numparse=True,
        colalign=(*["left"] * texts, *["right"] * (len(headers) - texts)),
    )
