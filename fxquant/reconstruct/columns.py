"""Rounding the columns of one weight with error feedback, and the Hessian that it needs.

For a layer y = W·x and H = Σ x·xᵀ over the calibration data, the increase of the squared output
error, tr((W − Ŵ)·H·(W − Ŵ)ᵀ), is kept small by rounding one column of W after the other and
adding to the columns not rounded yet what minimizes the rest (optimal brain surgeon; Frantar et
al., GPTQ, ICLR 2023, algorithm 1):

    H⁻¹ = UᵀU, U upper triangular      e_i = (w_i − ŵ_i) / U_ii      w_j ← w_j − e_i · U_ij,  j > i
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.spec import QParams

__all__ = ["ColumnGrid", "Columns", "round_columns"]

_ROWS_A_COLUMN = 8  # inputs for each column of the Hessian: more change nothing, and cost time
_FEWEST_ROWS = 4096
_WIDEST = 8192  # columns of one Hessian; a wider layer is taken in pieces
_STRIPE = 512
_ATTEMPTS = 4
_SEED = 0


@dataclass(frozen=True)
class ColumnGrid:
    """The codes of a weight ``[groups, rows, columns]``; the tensors are ``[groups, rows, 1]``."""

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes, float32."""
        steps = (weight * torch.reciprocal(self.scale)).round_() + self.zero_point
        return steps.clamp_(self.qmin, self.qmax)

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for, float32."""
        return (codes - self.zero_point) * self.scale


def round_columns(
    weight: Tensor,
    hessian: Tensor,
    grid: ColumnGrid,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    activation_order: bool = True,
) -> tuple[Tensor, float]:
    """Codes for a weight with error feedback, and the error's share of nearest rounding's.

    Args:
        weight: float32 ``[groups, rows, columns]``.
        hessian: float32 ``[groups, columns, columns]``, up to a factor.
        grid: the codes to choose from.
        damping, block_size, activation_order: see `gptq`.

    Returns:
        Codes, float32 of the weight's shape; and the squared output error in units of that of
        nearest rounding, at most 1.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = torch.arange(weight.shape[2]).expand(weight.shape[0], -1)
    if activation_order:
        order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    rows = order[:, None, :].expand_as(weight)
    nearest = grid.codes(weight)
    factor = _inverse_factor(hessian, order, damping)
    if factor is None:
        return nearest, 1.0
    codes = torch.empty_like(weight).scatter_(
        2, rows, _feed_back(weight.gather(2, rows), factor, grid, block_size)
    )
    before, after = (_error(weight - grid.values(each), hessian) for each in (nearest, codes))
    codes = torch.where((after < before)[:, :, None], codes, nearest)
    total = float(before.sum())
    return codes, float(torch.minimum(before, after).sum()) / total if total > 0 else 1.0


def _feed_back(weight: Tensor, factor: Tensor, grid: ColumnGrid, block_size: int) -> Tensor:
    weight = weight.clone()
    codes = torch.empty_like(weight)
    columns = weight.shape[2]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        # Columns as rows: each is read and written as a whole.
        block = weight[:, :, start:end].transpose(1, 2).contiguous()
        inner = factor[:, start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            column = block[:, i, :, None]
            chosen = grid.codes(column)
            codes[:, :, start + i] = chosen[:, :, 0]
            error = (column - grid.values(chosen))[:, :, 0] / inner[:, i, i, None]
            errors[:, i] = error
            if i + 1 < end - start:
                block[:, i + 1 :].sub_(inner[:, i, i + 1 :, None] * error[:, None, :])
        if end < columns:
            weight[:, :, end:].baddbmm_(
                errors.transpose(1, 2), factor[:, start:end, end:], alpha=-1.0
            )
    return codes


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """The upper triangular U with UᵀU = H⁻¹, columns in `order`; None: the Hessian is not usable.

    With rows and columns in the reverse order, H = L·Lᵀ: then U is L⁻¹, reversed again.
    """
    reverse = order.flip(1)
    hessian = hessian.gather(1, reverse[:, :, None].expand_as(hessian))
    hessian = hessian.gather(2, reverse[:, None, :].expand_as(hessian))
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # An input that is always zero: its column is rounded by itself.
    diagonal += torch.where(diagonal > 0, 0.0, torch.where(mean > 0, mean, 1.0))
    identity = torch.eye(hessian.shape[1]).expand_as(hessian)
    for attempt in range(_ATTEMPTS):
        diagonal += damping * 10**attempt * mean
        lower, info = torch.linalg.cholesky_ex(hessian)
        if not bool(info.any()):
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            if bool(torch.isfinite(inverse).all()):
                return inverse.flip(1, 2)
    return None


def _error(difference: Tensor, hessian: Tensor) -> Tensor:
    return (torch.bmm(difference, hessian) * difference).sum(2)


class Columns:
    """A layer's weight as groups of matrices, and the inputs that their columns see."""

    def __init__(self, layer: Any, qparams: QParams) -> None:
        self.layer = layer
        self.shape = tuple(int(size) for size in self.layer.weight.shape)
        rows, width = self.shape[0], math.prod(self.shape[1:])
        self.linear = isinstance(layer, nn.Linear)
        if self.linear:
            self.groups = next(n for n in range(1, width + 1) if _splits(width, n))
            self.columns = width // self.groups
        else:
            self.groups, self.columns = int(self.layer.groups), width
        scale, zero = (
            each.expand(rows).reshape(1 if self.linear else self.groups, -1, 1)
            for each in (qparams.scale, qparams.zero_point.to(torch.float32))
        )
        if self.linear:
            scale, zero = (each.expand(self.groups, -1, -1) for each in (scale, zero))
        self.grid = ColumnGrid(scale, zero, qparams.qmin, qparams.qmax)

    def split(self, weight: Tensor) -> Tensor:
        """The weight, float32 ``[groups, rows, columns]``."""
        if self.linear:
            weight = weight.view(self.shape[0], self.groups, self.columns).transpose(0, 1)
        return weight.reshape(self.groups, -1, self.columns).float()

    def join(self, codes: Tensor) -> Tensor:
        """Codes in the weight's shape, int8."""
        if self.linear:
            codes = codes.transpose(0, 1)
        return codes.reshape(self.shape).to(torch.int8)

    def hessian(self, inputs: Iterable[Tensor], images: int) -> Tensor:
        """Σ x·xᵀ over the images, float32 ``[groups, columns, columns]``.

        Of large feature maps as many positions as the Hessian's size calls for.
        """
        wanted = -(-max(_ROWS_A_COLUMN * self.columns, _FEWEST_ROWS) // images)
        generator = torch.Generator().manual_seed(_SEED)
        total = torch.zeros(self.groups, self.columns, self.columns)
        for x in inputs:
            rows = (
                self._tokens(x, wanted, generator)
                if self.linear
                else self._patches(x, wanted, generator)
            )
            for start in range(0, self.columns, _STRIPE):
                # The lower half is the upper one, mirrored.
                stripe = slice(start, start + _STRIPE)
                total[:, stripe, start:].baddbmm_(rows[:, stripe], rows[:, start:].transpose(1, 2))
        return total.triu().add_(total.triu(1).transpose(1, 2))

    def _tokens(self, x: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
        x = x.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
        x = x[:, _choose(x.shape[1], wanted, generator)]
        return x.reshape(-1, self.groups, self.columns).permute(1, 2, 0).float()

    def _patches(self, x: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
        layer, dims = self.layer, len(self.shape) - 2
        x = x if x.dim() == dims + 2 else x.unsqueeze(0)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        places, offsets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        for size, kernel, step, gap in zip(
            x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        ):
            steps = torch.arange((size - gap * (kernel - 1) - 1) // step + 1) * step
            places = (places[:, None] * size + steps).flatten()
            offsets = (offsets[:, None] * size + torch.arange(kernel) * gap).flatten()
        places = places[_choose(len(places), wanted, generator)]
        flat = x.flatten(2)
        taken = flat[:, :, (offsets[:, None] + places).flatten()]
        taken = taken.view(len(x), self.groups, -1, len(offsets), len(places))
        return taken.permute(1, 2, 3, 0, 4).reshape(self.groups, self.columns, -1).float()


def _splits(width: int, pieces: int) -> bool:
    return width % pieces == 0 and width // pieces <= _WIDEST


def _choose(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    if wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
