"""Fake quantization with fixed parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.simulate.quantizers.straight_through import straight_through
from fxquant.spec import QParams

_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}
_LETTERS = {torch.int8: "s", torch.uint8: "u", torch.int16: "s"}


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """`QParams.fake_quantize` with the gradient of `straight_through` to `x`."""
    dims = x.dim()
    if qparams.scale.numel() == 1:
        zero_point: Any = int(qparams.zero_point)
    else:
        zero_point = qparams.aligned(qparams.zero_point, dims)
    bounds = (qparams.qmin - zero_point, qparams.qmax - zero_point)
    return straight_through(x, qparams.aligned(qparams.scale, dims), *bounds)


class AffineQuantizer(nn.Module):
    """Quantizes and dequantizes: ``scale * (clamp(round(x / scale) + z, qmin, qmax) - z)``.

    Its forward equals `QParams.fake_quantize` bit for bit. The parameters belong to the state
    dictionary; they stay float32 when the module is converted to another float type.

    Attributes:
        enabled: where False, the forward returns its input.
    """

    def __init__(self, qparams: QParams | None = None, *, enabled: bool = True) -> None:
        super().__init__()
        self._qparams = qparams
        self.enabled = enabled

    @property
    def has_qparams(self) -> bool:
        """Whether the parameters are known."""
        return self._qparams is not None

    @property
    def qparams(self) -> QParams:
        """The parameters.

        Raises:
            ValueError: they are not known yet.
        """
        if self._qparams is None:
            raise ValueError(f"this {type(self).__name__} has no parameters yet")
        return self._qparams

    @property
    def detail(self) -> str:
        """The quantizer in a few words, as listings show it."""
        if self._qparams is None:
            return "not calibrated"
        return describe(self._qparams)

    def quantize(self, x: Tensor) -> Tensor:
        """The integer codes of a float tensor."""
        return self.qparams.quantize(x)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values that the codes can say, of x's shape and dtype."""
        if not self.enabled or self._qparams is None:
            return x
        return fake_quantize(x, self._qparams)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return self.detail

    def get_extra_state(self) -> dict[str, Any] | None:
        """The parameters as plain values, for the state dictionary."""
        if self._qparams is None:
            return None
        return {
            "scale": self._qparams.scale,
            "zero_point": self._qparams.zero_point,
            "qmin": self._qparams.qmin,
            "qmax": self._qparams.qmax,
            "dtype": str(self._qparams.dtype).removeprefix("torch."),
            "axis": self._qparams.axis,
        }

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Take over what `get_extra_state` gave."""
        if state is None:
            self._qparams = None
        else:
            self._qparams = QParams(**{**state, "dtype": _DTYPES[state["dtype"]]})


def describe(qparams: QParams) -> str:
    """Parameters in a few words: ``u8 [0, 255] scale 0.0123 zero point 7``."""
    bits = max(qparams.qmax - qparams.qmin, 1).bit_length()
    codes = f"{_LETTERS[qparams.dtype]}{bits} [{qparams.qmin}, {qparams.qmax}]"
    if qparams.scale.numel() > 1:
        low, high = torch.aminmax(qparams.scale)
        return f"{codes} per channel, scale {float(low):.3g} to {float(high):.3g}"
    zero_point = int(qparams.zero_point)
    zero = f" zero point {zero_point}" if zero_point else ""
    return f"{codes} scale {float(qparams.scale):.3g}{zero}"
