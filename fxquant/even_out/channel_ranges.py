"""What calibration says about every channel of some modules' inputs or outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxquant.errors import CalibrationError
from fxquant.even_out.layers import layer_at
from fxquant.simulate.sweep import sweep

__all__ = ["ChannelRange", "measure_ranges"]


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """The range of each channel, the last dimension, of what a module reads or yields.

    Attributes:
        low, high: the extremes in the data, [C].
        rows: how many rows [C] were seen.
        weight: of the module when it was measured. A module with another weight since then has
            other ranges.
    """

    low: Tensor
    high: Tensor
    rows: int
    weight: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each channel, [C]."""
        return torch.maximum(-self.low, self.high)


def measure_ranges(
    fused: fx.GraphModule,
    paths: Iterable[str],
    data: Iterable[tuple[Any, ...]],
    *,
    of: Literal["inputs", "outputs"],
) -> dict[str, ChannelRange]:
    """The channel ranges of the modules at `paths`, in one sweep over `data`; without paths none.

    Raises CalibrationError for data that are empty, give NaN or infinite values, or do not run
    through the graph.
    """
    found: dict[str, ChannelRange] = {}

    def see(path: str) -> Callable[[Tensor], None]:
        weight = layer_at(fused, path).weight

        def look(value: Tensor) -> None:
            if not value.numel():
                return
            rows = value.detach().reshape(-1, value.shape[-1])
            low, high, count = rows.amin(0), rows.amax(0), len(rows)
            if path in found:
                low = torch.minimum(low, found[path].low)
                high = torch.maximum(high, found[path].high)
                count += found[path].rows
            found[path] = ChannelRange(low, high, count, weight)

        return look

    seers = {path: see(path) for path in paths}
    if not seers:
        return {}
    if of == "inputs":
        sweep(fused, data, inputs=seers)
    else:
        sweep(fused, data, outputs=seers)
    for path in seers:
        if path not in found:
            raise CalibrationError(
                f"the {of} of {path!r} were never seen: calibrate with some data"
            )
        if not bool((found[path].low.isfinite() & found[path].high.isfinite()).all()):
            raise CalibrationError(
                f"the {of} of {path!r} hold NaN or infinite values: look at the inputs"
            )
    return found
