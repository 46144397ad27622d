"""An activation quantizer whose step size is learned."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxquant.simulate.quantizers.activation import ActivationQuantizer
from fxquant.simulate.quantizers.straight_through import straight_through
from fxquant.spec import LARGEST_SCALE, SMALLEST_SCALE, QParams

_WIDEST = 8  # beyond 8 bits a step has nothing to learn


class LearnedStep(nn.Module):
    """Learned step size quantization (Esser et al., ICLR 2020).

    Takes over the grid of a frozen, per-tensor `ActivationQuantizer`. Forward: the same bits as
    the quantizer with this scale, which `follow` hands on. The zero point stays: 0 on a one-sided
    grid. Backward: `straight_through` with the factor g = 1 / sqrt(N · Q_p) of section 2.2; N
    counts the values of one image, so that it does not depend on how a batch is split.

    Raises:
        ValueError: the quantizer cannot be learned; ask `can_learn` first.
    """

    operation = "quantize"

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        if not can_learn(quantizer):
            raise ValueError(
                "only a frozen quantizer of one scale and at most 8 bits learns its step"
            )
        self.source = quantizer
        self.zero_point = int(quantizer.qparams.zero_point)
        self.scale = nn.Parameter(quantizer.qparams.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values that the codes can say, of x's shape and dtype."""
        grid = self.source.qparams
        bounds = (grid.qmin - self.zero_point, grid.qmax - self.zero_point)
        features = max(1, x.numel() // max(1, x.shape[0])) if x.dim() else 1
        factor = 1.0 / math.sqrt(features * max(1, bounds[1]))
        return straight_through(x, self.scale, *bounds, factor)

    def follow(self) -> None:
        """After an optimizer's step: keep the scale positive, and let `source` have it.

        Operations with an integer form read the grid of their input from its quantizer.
        """
        with torch.no_grad():
            self.scale.clamp_(SMALLEST_SCALE, LARGEST_SCALE)
        if bool(torch.isfinite(self.scale).all()):
            set_scale(self.source, self.scale.detach().clone())

    def learned_qparams(self) -> QParams:
        """The grid with the learned scale, on the CPU."""
        grid = self.source.qparams.to("cpu")
        scale = self.scale.detach().cpu().clone()
        return QParams(scale, grid.zero_point, grid.qmin, grid.qmax, grid.dtype)


def can_learn(quantizer: object) -> bool:
    """Whether `LearnedStep` takes a module over.

    A frozen ActivationQuantizer of one scale that nothing else dictates, of at most 8 bits.
    """
    if not isinstance(quantizer, ActivationQuantizer):
        return False
    if not quantizer.enabled or not quantizer.has_qparams:
        return False
    dictated = getattr(quantizer, "fixed", None) is not None
    return not dictated and quantizer.qparams.axis is None and quantizer.spec.bits <= _WIDEST


def set_scale(quantizer: ActivationQuantizer, scale: Tensor) -> None:
    """Give a frozen quantizer of one scale another one."""
    quantizer._qparams = replace(quantizer.qparams, scale=scale)
