"""Layers whose input is quantized at run time: float in, exact integer sums, float out.

The input's scale and zero point come from its own smallest and largest value, as FBGEMM chooses
them, so one sample's result depends on what else is in the batch. Weights are int8, symmetric.
The linear layer is bit for bit the same everywhere; the recurrent layers pass through sigmoid and
tanh in float32, whose last bit is the math library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from fxquant.errors import CompileError, InputError
from fxquant.integer.bounds import checked_bound, shifted_weight, weight_reach
from fxquant.integer.linear import exact_matmul_dtype
from fxquant.integer.rounding import channel_factors

# What FBGEMM computes with: 8 bits, and no scale below this one.
_QMAX = 255
SMALLEST_SCALE = numpy.float32(6.1e-5)


def choose_qparams(low: float, high: float) -> tuple[float, int]:
    """The scale (a float32 value) and zero point of quint8 for values in [low, high].

    The range is widened to hold 0. The zero point is computed from the bound that gives the
    smaller error. The rules are FBGEMM's ChooseQuantizationParams, with double intermediates.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / _QMAX
    single = numpy.float32(scale)
    if single == 0 or not 1.0 / float(single) <= float(numpy.finfo(numpy.float32).max):
        scale = 0.1
    if scale < float(SMALLEST_SCALE):
        amplifier = SMALLEST_SCALE / numpy.float32(scale)
        scale = float(SMALLEST_SCALE)
        if low == 0:
            high = float(SMALLEST_SCALE * numpy.float32(_QMAX))
        elif high == 0:
            low = float(-SMALLEST_SCALE * numpy.float32(_QMAX))
        else:
            low = float(numpy.float32(low) * amplifier)
            high = float(numpy.float32(high) * amplifier)
    from_low, from_high = -low / scale, _QMAX - high / scale
    # |qmin| + |low / s| against |qmax| + |high / s|: the smaller one has the smaller rounding.
    exact = from_low if abs(low / scale) < _QMAX + abs(high / scale) else from_high
    return float(numpy.float32(scale)), round(min(max(exact, 0.0), float(_QMAX)))


@dataclass(frozen=True, eq=False)
class _Weight:
    """An int8 weight [O, K] made ready for many products."""

    matrix: Tensor  # [K, O] in a float type that keeps the sums exact
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def prepare(cls, operator: str, weight: Tensor, scale: Tensor, bias: Tensor | None) -> _Weight:
        shifted = shifted_weight(weight, None)
        # The zero point is not known yet: 0 and 255 are the worst, and reach as far.
        bound = checked_bound(operator, torch.uint8, 0, weight_reach(shifted), None)
        carrier = exact_matmul_dtype(bound, torch.uint8, 0, shifted)
        return cls(shifted.to(carrier).t(), scale, bias)

    def apply(self, operator: str, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise CompileError(f"fxquant.{operator}: the input is {x.dtype}; use torch.float32")
        rows = x.reshape(-1, x.shape[-1])
        if rows.numel():
            low, high = (float(value) for value in torch.aminmax(rows))
            if not (-float("inf") < low <= high < float("inf")):
                raise InputError(f"fxquant.{operator}: the input holds NaN or infinite values")
        else:
            low = high = 0.0
        scale, zero_point = choose_qparams(low, high)
        inverse = torch.reciprocal(torch.tensor(scale, dtype=torch.float32))
        codes = (rows * inverse).round_().add_(zero_point).clamp_(0, _QMAX).sub_(zero_point)
        # Autocast would run a float32 product in bfloat16, and round its sums to 8 bits.
        with torch.autocast("cpu", enabled=False):
            sums = (codes.to(self.matrix.dtype) @ self.matrix).to(torch.float32)
        real = sums.mul_(channel_factors(scale, self.scale, None))
        if self.bias is not None:
            real = real.add_(self.bias)
        return real.reshape(*x.shape[:-1], real.shape[-1])


def linear_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y = float32(Σ (q_x − z_x) · q_w) · float32(s_x · s_w) + b``, each product rounded alone.

    ``x`` is float32 [..., K] and is quantized as `choose_qparams` says of its range; ``weight``
    int8 [O, K], ``weight_scale`` float32 [O] or [1], ``bias`` float32 [O]; the result is float32
    [..., O]. Raises InputError for an input that is not finite, CompileError where the sums could
    leave int32.
    """
    prepared = _Weight.prepare("linear_dynamic", weight, weight_scale, bias)
    return prepared.apply("linear_dynamic", x)


def lstm_dynamic(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A long short-term memory of `linear_dynamic` layers: output, h_n and c_n as nn.LSTM's.

        i, f, g, o = W_ih x + W_hh h        c' = σ(f) c + σ(i) tanh(g)        h' = σ(o) tanh(c')

    ``x`` is float32 [T, B, I], or [B, T, I] where ``batch_first``; ``hx`` is [h_0, c_0], each
    [layers · directions, B, H], or empty for zeros; ``weights`` and ``scales`` hold W_ih and W_hh
    of every layer and direction, in the order of nn.LSTM; ``biases`` likewise, or nothing. The
    input of a layer is quantized as a whole, h at every step.
    """

    def cell(from_input: Tensor, weight: _Weight, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = state
        i, f, g, o = (weight.apply("lstm_dynamic", h) + from_input).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    y, (h, c) = _recur(
        "lstm_dynamic", cell, 2, x, hx, weights, scales, biases, bidirectional, batch_first
    )
    return y, h, c


def gru_dynamic(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """A gated recurrent unit of `linear_dynamic` layers: output and h_n as nn.GRU's.

        r = σ(W_ir x + W_hr h)    z = σ(W_iz x + W_hz h)
        n = tanh(W_in x + r · W_hn h)    h' = (h − n) · z + n

    The arguments are those of `lstm_dynamic`; ``hx`` is [h_0] or empty.
    """

    def cell(from_input: Tensor, weight: _Weight, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        reset_h, update_h, new_h = weight.apply("gru_dynamic", h).chunk(3, 1)
        reset_x, update_x, new_x = from_input.chunk(3, 1)
        reset, update = (reset_h + reset_x).sigmoid(), (update_h + update_x).sigmoid()
        new = (new_x + new_h * reset).tanh()
        return ((h - new) * update + new,)

    y, (h,) = _recur(
        "gru_dynamic", cell, 1, x, hx, weights, scales, biases, bidirectional, batch_first
    )
    return y, h


_Cell = Callable[[Tensor, _Weight, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _recur(
    operator: str,
    cell: _Cell,
    states: int,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers and directions over time: the output, and the last value of every state."""
    prepared = [
        _Weight.prepare(operator, weight, scale, biases[index] if biases else None)
        for index, (weight, scale) in enumerate(zip(weights, scales, strict=True))
    ]
    layer_input = x.transpose(0, 1) if batch_first else x
    if not layer_input.shape[0]:
        raise InputError(f"fxquant.{operator}: the sequence is empty")
    directions = 2 if bidirectional else 1
    zeros = x.new_zeros(layer_input.shape[1], weights[1].shape[1])
    last: list[tuple[Tensor, ...]] = []
    for layer in range(len(weights) // (2 * directions)):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            from_input, from_hidden = prepared[2 * index : 2 * index + 2]
            steps = list(from_input.apply(operator, layer_input).unbind(0))
            state = tuple(initial[index] for initial in hx) if hx else (zeros,) * states
            sequence = []
            for step in reversed(steps) if direction else steps:
                state = cell(step, from_hidden, state)
                sequence.append(state[0])
            outputs.append(torch.stack(sequence[::-1] if direction else sequence))
            last.append(state)
        layer_input = torch.cat(outputs, 2)
    y = layer_input.transpose(0, 1).contiguous() if batch_first else layer_input
    return y, tuple(torch.stack(values) for values in zip(*last, strict=True))
