"""The quantizers of a layer's weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fxquant.simulate.quantizers.affine import AffineQuantizer
from fxquant.spec import QParams


class WeightQuantizer(AffineQuantizer):
    """Maps a weight to its quantized image; its parameters are known from the start."""

    def __init__(self, qparams: QParams, *, enabled: bool = True) -> None:
        super().__init__(qparams, enabled=enabled)


class RoundedWeightQuantizer(WeightQuantizer):
    """Maps a weight to codes that something better than nearest rounding has chosen.

    Args:
        qparams: the grid.
        codes: int8 of the weight's shape, within the grid's bounds.

    Raises:
        ValueError: the codes leave the grid.
    """

    codes: Tensor

    def __init__(self, qparams: QParams, codes: Tensor, *, enabled: bool = True) -> None:
        super().__init__(qparams, enabled=enabled)
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if not qparams.qmin <= low <= high <= qparams.qmax:
            raise ValueError(
                f"codes in [{low}, {high}] leave the grid [{qparams.qmin}, {qparams.qmax}]"
            )
        self.register_buffer("codes", codes.to(qparams.dtype), persistent=False)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes chosen, whatever `x` is."""
        return self.codes

    def forward(self, x: Tensor) -> Tensor:
        """The values of the codes, of x's dtype; a gradient passes to `x` as it is."""
        if not self.enabled:
            return x
        value = self.qparams.dequantize(self.codes).to(x.dtype)
        return value + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else value

    def get_extra_state(self) -> dict[str, Any] | None:
        """The parameters and the codes, for the state dictionary."""
        state = super().get_extra_state()
        return None if state is None else {**state, "codes": self.codes}

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Take over what `get_extra_state` gave."""
        assert state is not None
        self.codes = cast(Tensor, state["codes"])
        super().set_extra_state({key: state[key] for key in state if key != "codes"})
