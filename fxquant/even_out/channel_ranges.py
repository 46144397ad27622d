"""What calibration says about every channel of some layers' outputs, in one sweep of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxquant.errors import CalibrationError

__all__ = ["ChannelRanges", "Extremes"]

Extremes = Literal["all", "mean"]
"""``all``: the extremes of the whole data. ``mean``: the mean over the images of each image's."""

_SEED = 0


class ChannelRanges:
    """The range of each channel (last dimension) of the outputs of several modules, streamed.

    Dimension 0 counts as the images, where there is more than one dimension.

    Args:
        fused: the graph.
        paths: the modules.
        rows: how many rows [C] of each output are kept as a sample, drawn anew from each batch.
    """

    def __init__(self, fused: fx.GraphModule, paths: Iterable[str], *, rows: int = 0) -> None:
        self.fused = fused
        self.paths = tuple(dict.fromkeys(paths))
        self._rows = rows
        self._low: dict[str, Tensor] = {}
        self._high: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._images: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._sample: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(_SEED)
        self._seen: dict[str, int] = {}

    def sweep(self, data: Iterable[tuple[Any, ...]]) -> ChannelRanges:
        """Feed `data`, tuples of the graph's arguments, through the graph; returns itself.

        Raises CalibrationError for data that are empty, give NaN or infinite values, or do not
        run through the graph.
        """
        handles = [
            self.fused.get_submodule(path).register_forward_hook(self._hook(path))
            for path in self.paths
        ]
        try:
            with torch.no_grad():
                for index, batch in enumerate(data):
                    try:
                        self.fused(*batch)
                    except RuntimeError as error:
                        raise CalibrationError(
                            f"calibration batch {index} does not run through the model: "
                            f"{str(error).partition(chr(10))[0]}"
                        ) from error
        finally:
            for handle in handles:
                handle.remove()
        for path in self.paths:
            if path not in self._low:
                raise CalibrationError(
                    f"the outputs of {path!r} were never seen: calibrate with some data"
                )
            if not bool((self._low[path].isfinite() & self._high[path].isfinite()).all()):
                raise CalibrationError(
                    f"the outputs of {path!r} hold NaN or infinite values: look at the inputs"
                )
        return self

    def range(self, path: str, extremes: Extremes = "all") -> tuple[Tensor, Tensor]:
        """The lower and the upper bound of each channel, float32 [C]."""
        if extremes == "all":
            return self._low[path], self._high[path]
        low, high = self._sums[path] / self._images[path]
        return low.float(), high.float()

    def rows(self, path: str) -> int:
        """How many rows [C] of the output were seen."""
        return self._counts[path]

    def sample(self, path: str) -> Tensor:
        """Rows of the output, float32 [R, C], at most as many as were asked for."""
        return self._sample[path]

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            if not y.numel():
                return
            y = y.detach().float()
            images = y.reshape(len(y) if y.dim() > 1 else 1, -1, y.shape[-1])
            low, high = images.amin(1), images.amax(1)
            sums = torch.stack([low.double().sum(0), high.double().sum(0)])
            low, high = low.amin(0), high.amax(0)
            if path in self._low:
                low, high = (
                    torch.minimum(low, self._low[path]),
                    torch.maximum(high, self._high[path]),
                )
                sums = sums + self._sums[path]
            self._low[path], self._high[path], self._sums[path] = low, high, sums
            self._images[path] = self._images.get(path, 0) + len(images)
            self._counts[path] = self._counts.get(path, 0) + images.shape[0] * images.shape[1]
            if self._rows:
                self._keep(path, images.flatten(0, 1))

        return hook

    def _keep(self, path: str, rows: Tensor) -> None:
        # Reservoir sampling by batches: each batch holds its share of all rows seen so far.
        before = self._seen.get(path, 0)
        self._seen[path] = before + len(rows)
        kept = self._sample.get(path, rows[:0])
        share = min(len(rows), max(1, round(self._rows * len(rows) / self._seen[path])))
        old = min(len(kept), self._rows - share)
        chosen = [
            values[torch.randperm(len(values), generator=self._generator)[:count]]
            for values, count in ((kept, old), (rows, share))
        ]
        self._sample[path] = torch.cat(chosen)
