"""The quantizer of a layer's weight."""

from __future__ import annotations

from fxquant.quantizers.affine import AffineQuantizer
from fxquant.spec import QParams


class WeightQuantizer(AffineQuantizer):
    """Maps a weight to its quantized image; its parameters are known from the start."""

    def __init__(self, qparams: QParams, *, enabled: bool = True) -> None:
        super().__init__(qparams, enabled=enabled)
