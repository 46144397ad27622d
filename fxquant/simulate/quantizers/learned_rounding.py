"""A weight quantizer that learns whether each weight is rounded down or up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.simulate.quantizers.weight import RoundedWeightQuantizer, WeightQuantizer
from fxquant.spec import QParams

STRETCH_LOW = -0.1
STRETCH_HIGH = 1.1
_SETTLED = 0.49  # a rounding this far from 1/2 is as good as decided
_NEAR = 0.45  # what lies this close to a code is rounded to it
_WIDTH = STRETCH_HIGH - STRETCH_LOW


class LearnedRounding(WeightQuantizer):
    """Adaptive rounding (Nagel et al., Up or Down?, ICML 2020, equations 22 to 24).

        h(V) = clip(1.2 · sigmoid(V) − 0.1, 0, 1)
        W'   = s · (clamp(floor(W / s) + z + h(V), qmin, qmax) − z)

    V has the weight's shape and starts where ``h = frac(W / s)``, so that the soft weight is
    the float weight wherever the grid reaches it. The grid may be symmetric or affine, of one
    scale or one a channel. `harden` decides.

    Args:
        qparams: the grid; it stays as it is.
        weight: the float weight.
        codes: where another method has rounded already: V starts as close to the float weight
            as it can while `harden` gives these.
    """

    base: Tensor

    def __init__(self, qparams: QParams, weight: Tensor, codes: Tensor | None = None) -> None:
        super().__init__(qparams)
        dims = weight.dim()
        zero_point = qparams.aligned(qparams.zero_point, dims)
        scaled = weight.detach().float() * qparams.aligned(qparams.inverse_scale, dims)
        if codes is not None:
            steps = codes.float() - zero_point
            scaled = scaled.clamp(steps - _NEAR, steps + _NEAR)
        floor = scaled.floor()
        fraction = (scaled - floor).clamp(0.0, 1.0)
        self.register_buffer("base", floor + zero_point)
        sigmoid = (fraction - STRETCH_LOW) / _WIDTH
        self.V = nn.Parameter(torch.log(sigmoid / (1 - sigmoid)))

    def share_up(self) -> Tensor:
        """h(V): how far each weight is rounded up, in [0, 1]."""
        return (torch.sigmoid(self.V) * _WIDTH + STRETCH_LOW).clamp(0.0, 1.0)

    def soft_weight(self, share_up: Tensor) -> Tensor:
        """The weight for given shares, float32."""
        qparams = self.qparams
        dims = self.base.dim()
        codes = (self.base + share_up).clamp(qparams.qmin, qparams.qmax)
        steps = codes - qparams.aligned(qparams.zero_point, dims)
        return steps * qparams.aligned(qparams.scale, dims)

    def forward(self, x: Tensor) -> Tensor:
        """The soft weight, of x's dtype; gradients go to V, none to `x`."""
        return self.soft_weight(self.share_up()).to(x.dtype)

    def regularizer(self, beta: float) -> Tensor:
        """``Σ (1 − |2 h(V) − 1|^β)``, a scalar: 0 where every rounding is decided."""
        return _Regularizer.apply(self.V, beta)  # type: ignore[no-any-return]

    def settled(self) -> int:
        """How many roundings are as good as decided."""
        with torch.no_grad():
            return int(((self.share_up() - 0.5).abs() >= _SETTLED).sum())

    def quantize(self, x: Tensor) -> Tensor:
        """The codes that `harden` would choose now, whatever `x` is."""
        with torch.no_grad():
            codes = (self.base + (self.share_up() >= 0.5)).clamp(
                self.qparams.qmin, self.qparams.qmax
            )
            return codes.to(self.qparams.dtype)

    def harden(self) -> RoundedWeightQuantizer:
        """The quantizer with every rounding decided, on the CPU."""
        return RoundedWeightQuantizer(self.qparams.to("cpu"), self.quantize(self.base).cpu())


class _Regularizer(torch.autograd.Function):
    """The regularizer and its gradient in closed form: autograd keeps six copies of V."""

    @staticmethod
    def forward(ctx: object, V: Tensor, beta: float) -> Tensor:
        sigmoid = torch.sigmoid(V)
        signed = (sigmoid * (2 * _WIDTH) + (2 * STRETCH_LOW - 1)).clamp_(-1.0, 1.0)
        size = signed.abs()
        powered = size.pow(beta - 1)
        # d/dV = −β |u|^(β−1) sign(u) · 2 · 1.2 σ(1 − σ), and 0 where h is clipped.
        slope = powered.mul(signed.sign_()).mul_(-2 * _WIDTH * beta)
        slope.mul_(sigmoid).mul_(1 - sigmoid).mul_(size < 1)
        ctx.save_for_backward(slope)  # type: ignore[attr-defined]
        return V.numel() - powered.mul_(size).sum()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return slope * gradients[0], None
