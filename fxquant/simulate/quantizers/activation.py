"""The quantizer of an activation: it observes, is frozen, and then simulates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxquant.simulate.observers import Observer, make_observer
from fxquant.simulate.quantizers.affine import AffineQuantizer, describe
from fxquant.spec import QParams, QuantSpec

_FINEST = 256  # a channel's scale is at most this many times finer than the tensor's


class ActivationQuantizer(AffineQuantizer):
    """Learns the range of the values that pass, then quantizes them.

    A fresh one lets values pass. While `observing` it gathers statistics and lets them pass.
    `freeze` fixes the parameters; from then on the forward quantizes, unless `enabled` is False.

    `channelwise` gives a one-sided quantizer a scale for each channel (dimension 1): the
    channel's largest value, where that lies below the range found for the tensor as a whole.
    `fixed` is a grid that what makes the value dictates: nothing is observed then.
    `sources` says how many tensors share the grid: each passes once in every forward, in turn.
    """

    operation = "quantize"

    def __init__(
        self,
        spec: QuantSpec,
        name: str = "",
        *,
        channelwise: bool = False,
        fixed: QParams | None = None,
        sources: int = 1,
    ) -> None:
        super().__init__()
        self.sources = sources
        self._calls = 0
        self.fixed = fixed
        self.channelwise = channelwise
        self._channel_max: Tensor | None = None
        self.spec = spec
        self.observer: Observer = make_observer(spec, name=name)
        self.observing = False

    @property
    def one_sided(self) -> bool:
        """Whether the values are known to be non-negative, so that the zero point is 0."""
        return self.spec.one_sided

    def make_one_sided(self) -> None:
        """Use an unsigned grid that starts at zero.

        Raises:
            ValueError: the parameters are already fixed.
        """
        if self.has_qparams:
            raise ValueError("a quantizer cannot become one-sided after it was frozen")
        self.spec = self.observer.spec = replace(self.spec, one_sided=True)

    def freeze(self) -> None:
        """Fix the parameters from what was observed, and let go of the statistics.

        Raises:
            CalibrationError: nothing was observed, or the values do not fit the spec.
        """
        self._qparams = self.fixed or self.observer.qparams()
        if self.channelwise and self.one_sided and self._channel_max is not None:
            self._qparams = _channelwise(self._qparams, self._channel_max)
            self._channel_max = None
        self.observer = make_observer(self.spec, name=self.observer.name)
        self.observing = False

    def forward(self, x: Tensor) -> Tensor:
        """Let x pass, observed or not, before `freeze`; quantize it afterwards."""
        if self.observing:
            if self.fixed is None:
                self.observer.update(x, self._calls % self.sources)
                self._calls += 1
            if self.channelwise and self.one_sided and x.numel():
                largest = x.detach().amax([0, *range(2, x.dim())])
                seen = self._channel_max
                self._channel_max = largest if seen is None else torch.maximum(seen, largest)
            return x
        return super().forward(x)

    @property
    def detail(self) -> str:
        """The quantizer in a few words, as listings show it."""
        form = "one-sided" if self.one_sided else self.spec.scheme
        if self._qparams is None:
            return f"{'s' if self.spec.signed else 'u'}{self.spec.bits} {form}"
        return f"{describe(self._qparams)} {form}"

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Take over what `get_extra_state` gave; a frozen state ends the observation."""
        super().set_extra_state(state)
        self.observing = False


def _channelwise(whole: QParams, largest: Tensor) -> QParams:
    coarsest = whole.scale.expand(len(largest))
    scale = (largest.float() / whole.qmax).clamp(coarsest / _FINEST, coarsest)
    zeros = torch.zeros(len(largest), dtype=torch.int32)
    return QParams(scale.contiguous(), zeros, whole.qmin, whole.qmax, whole.dtype, axis=1)
