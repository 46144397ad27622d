"""Torch's dynamic LSTM and GRU on packed int8 cells, per channel or per tensor.

They compute what the reference does up to float rounding: FBGEMM adds biases in a fused
multiply-add, and sigmoid and tanh differ in their last bit between vectors and single values.
Where that moves a hidden value across a tie, the code that it is quantized to moves by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.x86.kernels import pack_linear, quantized_weight

__all__ = ["gru", "lstm", "pack_cells"]

_LSTM = torch.ops.aten.quantized_lstm.input
_GRU = torch.ops.aten.quantized_gru.input


def pack_cells(
    weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Any]:
    """The cell of every layer and direction, from `fxquant.lstm_dynamic`'s lists."""
    made = torch.ops.quantized.make_quantized_cell_params_dynamic
    cells = []
    for index in range(0, len(weights), 2):
        pairs = zip(weights[index : index + 2], scales[index : index + 2], strict=True)
        own: list[Tensor | None] = [*biases[index : index + 2]] or [None, None]
        packed = [
            pack_linear(quantized_weight(weight, scale, None), bias)
            for (weight, scale), bias in zip(pairs, own, strict=True)
        ]
        # The kernels insist on biases, although those that they add are in the packed weights.
        zeros = torch.zeros(weights[index].shape[0])
        given = [zeros if bias is None else bias for bias in own]
        cells.append(made(*packed, *given, False))
    return cells


def lstm(
    x: Tensor,
    hx: list[Tensor],
    cells: list[Any],
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, h_n and c_n; without `hx` from zeros."""
    if not hx:
        zeros = _zeros(x, cells, hidden_size, batch_first)
        hx = [zeros, zeros]
    return _LSTM(  # type: ignore[no-any-return]
        x, hx, cells, True, num_layers, 0.0, False, bidirectional, batch_first,
        dtype=torch.qint8, use_dynamic=True,
    )  # fmt: skip


def gru(
    x: Tensor,
    hx: list[Tensor],
    cells: list[Any],
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """The output and h_n; without `hx` from zeros."""
    h = hx[0] if hx else _zeros(x, cells, hidden_size, batch_first)
    return _GRU(  # type: ignore[no-any-return]
        x, h, cells, True, num_layers, 0.0, False, bidirectional, batch_first
    )


def _zeros(x: Tensor, cells: list[Any], hidden_size: int, batch_first: bool) -> Tensor:
    return x.new_zeros(len(cells), x.shape[0 if batch_first else 1], hidden_size)
