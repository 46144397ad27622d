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

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is stored for a weight: int8 of its shape, and a zero point where it needs one."""
        return without_zero_point(self.quantize(weight), self.qparams)


def without_zero_point(codes: Tensor, qparams: QParams) -> tuple[Tensor, Tensor | None]:
    """``q - z`` for the codes q of a grid, and None; q and z where the difference leaves int8.

    The real value is ``s * (q - z)``, so that kernels need no zero point of a weight. With up to
    7 bits the difference always fits.

    Args:
        codes: int8 of the weight's shape.
        qparams: the grid.

    Returns:
        int8 of the shape of `codes`; None or int32 of the shape of the grid's scale.
    """
    if codes.dtype == torch.int8 and not bool(qparams.zero_point.any()):
        return codes, None
    steps = codes.to(torch.int32) - qparams.aligned(qparams.zero_point, codes.dim())
    narrow = steps.to(torch.int8)
    return (
        (narrow, None)
        if torch.equal(narrow.to(torch.int32), steps)
        else (codes, qparams.zero_point)
    )


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
