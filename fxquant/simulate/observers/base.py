"""What all range estimators share: finite values, the sign, and the step to `QParams`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.simulate.observers.ranges import qparams_from_range
from fxquant.spec import QParams, QuantSpec


class Observer(ABC):
    """Watches values and then says which parameters quantize them well.

    `spec` may be replaced until `qparams` is called, for instance by a one-sided one.

    Args:
        spec: the form of the quantized values and the estimator's options.
        axis: the channel dimension of what is observed, or None for one range for all.
        name: whose values these are, for error messages.
    """

    def __init__(self, spec: QuantSpec, axis: int | None = None, name: str = "") -> None:
        self.spec = spec
        self.axis = axis
        self.name = name
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None

    def update(self, x: Tensor, source: int = 0) -> None:
        """Take in more values of one of the tensors that share the range; none changes nothing.

        Raises:
            CalibrationError: a value is NaN or infinite, or the channels differ from before.
        """
        if x.numel() == 0:
            return
        rows = as_rows(x.detach(), self.axis)
        samples = len(x) if self.axis is None and x.dim() > 1 and self.needs_samples else 1
        if samples > 1:
            # In memory order the samples stay together whatever the layout of their channels.
            sample_low, sample_high = _extremes(rows.view(samples, -1))
            self.observe_samples(sample_low, sample_high, source)
            low, high = sample_low.amin().reshape(1), sample_high.amax().reshape(1)
        else:
            low, high = torch.aminmax(rows, dim=1) if len(rows) > 1 else _whole(rows)
            if self.needs_samples:
                self.observe_samples(low, high, source)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            bad = int((~torch.isfinite(rows)).sum())
            raise CalibrationError(
                f"{self.subject} hold {bad} NaN or infinite of {rows.numel()} values: "
                "look at the inputs and the weights before it"
            )
        low, high = low.double(), high.double()
        if self.minimum is None or self.maximum is None:
            self.minimum, self.maximum = low, high
        elif low.shape != self.minimum.shape:
            raise CalibrationError(
                f"{self.subject} have {len(low)} channels, before they had {len(self.minimum)}"
            )
        else:
            self.minimum = torch.minimum(self.minimum, low)
            self.maximum = torch.maximum(self.maximum, high)
        self.observe(rows, low, high)

    def qparams(self) -> QParams:
        """The parameters for what was seen.

        Raises:
            CalibrationError: nothing was seen, or negative values with a one-sided spec.
        """
        if self.minimum is None:
            raise CalibrationError(f"{self.subject} were never seen: calibrate with some data")
        if self.spec.one_sided and float(self.minimum.min()) < 0:
            raise CalibrationError(
                f"{self.subject} go down to {float(self.minimum.min()):.6g}, but their quantizer "
                "is one-sided: they were taken to be non-negative"
            )
        low, high = self.range()
        return qparams_from_range(self.spec, low, high, self.axis)

    @property
    def subject(self) -> str:
        """The observed values in words, the start of an error message."""
        return f"the values of {self.name!r}" if self.name else "the values"

    @property
    def needs_samples(self) -> bool:
        """Whether `observe_samples` wants the extremes of every image."""
        return False

    def observe_samples(self, low: Tensor, high: Tensor, source: int) -> None:
        """Take in the extremes ``[N]`` of each image of a batch; asked for by `needs_samples`."""
        raise NotImplementedError

    @abstractmethod
    def observe(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in finite values, float32 ``[C, N]``, with their float64 ``[C]`` extremes."""

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """The lower and the upper bound to fit the codes to, float64 ``[C]``."""

    def seen(self) -> tuple[Tensor, Tensor]:
        """The exact minimum and maximum of everything so far, float64 ``[C]``."""
        assert self.minimum is not None
        assert self.maximum is not None
        return self.minimum, self.maximum


def as_rows(x: Tensor, axis: int | None) -> Tensor:
    """A tensor as float32 rows ``[C, N]``, one a channel, or ``[1, N]`` without an axis.

    The order within a row means nothing, so channels-last memory is read as it lies.
    """
    x = x.to(torch.float32)
    if axis is not None:
        return x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    if x.dim() >= 4 and not x.is_contiguous():
        x = x.movedim(1, -1)
    return x.reshape(1, -1)


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Twice as fast as one `aminmax` over a dimension, which is not vectorised.
    return rows.amin(1), rows.amax(1)


def _whole(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Without `dim`, torch reduces in parallel and vectorised.
    low, high = torch.aminmax(rows)
    return low.reshape(1), high.reshape(1)
