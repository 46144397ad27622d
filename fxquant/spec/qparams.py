"""The numbers that quantize one value, once its range is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LARGEST_SCALE", "SMALLEST_SCALE", "QParams"]

SMALLEST_SCALE = 2.0**-60  # the product of two of them is still a normal float32
LARGEST_SCALE = 2.0**126  # its reciprocal is still a normal float32


@dataclass(frozen=True, eq=False)
class QParams:
    """The numbers that quantize a value: x = scale * (q - zero_point).

    Attributes:
        scale: float32 ``[1]``, or ``[C]`` along `axis`; positive and finite.
        zero_point: int32 of the same shape, within ``[qmin, qmax]``.
        qmin: the smallest code.
        qmax: the largest code.
        dtype: the integer type of the codes.
        axis: the channel dimension, or None for one scale for the whole tensor.

    Raises:
        ValueError: the parts contradict each other.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    dtype: torch.dtype
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise ValueError(
                "scale must be float32 and zero_point int32, "
                f"got {self.scale.dtype} and {self.zero_point.dtype}"
            )
        if self.scale.dim() != 1 or self.scale.shape != self.zero_point.shape:
            raise ValueError(
                "scale and zero_point must be vectors of one length, "
                f"got {tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            )
        if self.axis is None and self.scale.numel() != 1:
            raise ValueError(f"{self.scale.numel()} scales need an axis, got None")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise ValueError("every scale must be positive and finite")
        info = torch.iinfo(self.dtype)
        if not info.min <= self.qmin < self.qmax <= info.max:
            raise ValueError(f"codes [{self.qmin}, {self.qmax}] do not fit into {self.dtype}")
        low, high = torch.aminmax(self.zero_point)
        if not self.qmin <= int(low) <= int(high) <= self.qmax:
            raise ValueError(
                f"zero points [{int(low)}, {int(high)}] lie outside [{self.qmin}, {self.qmax}]"
            )

    def __repr__(self) -> str:
        if self.scale.numel() == 1:
            values = f"scale={self.scale.item():.6g}, zero_point={int(self.zero_point)}"
        else:
            low, high = torch.aminmax(self.scale)
            values = f"scale[{self.scale.numel()}]={low.item():.4g}..{high.item():.4g}"
        return f"QParams({values}, codes=[{self.qmin}, {self.qmax}], {self.dtype})"

    @property
    def inverse_scale(self) -> Tensor:
        """float32(1) / scale: what a value is multiplied by, of the shape of `scale`."""
        return torch.reciprocal(self.scale)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of a float tensor: clamp(round_half_even(x * (1 / scale)) + zero_point)."""
        return self._codes(x).to(self.dtype)

    def dequantize(self, q: Tensor) -> Tensor:
        """The float32 values of codes: (q - zero_point) * scale."""
        steps = q.to(torch.float32) - self.aligned(self.zero_point, q.dim())
        return steps * self.aligned(self.scale, q.dim())

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``dequantize(quantize(x))`` without leaving float; of x's dtype, no gradient."""
        steps = self._codes(x).sub_(self.aligned(self.zero_point, x.dim()))
        return steps.mul_(self.aligned(self.scale, x.dim())).to(x.dtype)

    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that the codes reach, float32 shaped as `scale`."""
        low = (self.qmin - self.zero_point).to(torch.float32) * self.scale
        return low, (self.qmax - self.zero_point).to(torch.float32) * self.scale

    def to(self, device: torch.device | str) -> QParams:
        """The same parameters on another device."""
        return QParams(
            self.scale.to(device),
            self.zero_point.to(device),
            self.qmin,
            self.qmax,
            self.dtype,
            self.axis,
        )

    def _codes(self, x: Tensor) -> Tensor:
        scaled = x.detach().to(torch.float32) * self.aligned(self.inverse_scale, x.dim())
        scaled.round_().add_(self.aligned(self.zero_point, x.dim()))
        return scaled.clamp_(self.qmin, self.qmax)

    def aligned(self, values: Tensor, dims: int) -> Tensor:
        """A vector shaped as `scale`, viewed so that it broadcasts over a tensor of `dims`."""
        if self.axis is None or dims == 0:
            return values.reshape(()) if dims == 0 else values
        shape = [1] * dims
        shape[self.axis] = -1
        return values.view(shape)
