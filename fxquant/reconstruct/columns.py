"""Rounding the columns of one weight with error feedback, and the Hessian that it needs.

For a layer y = W·x and H = Σ x·xᵀ over the calibration data, the increase of the squared output
error, tr((W − Ŵ)·H·(W − Ŵ)ᵀ), is kept small by rounding one column of W after the other and
adding to the columns not rounded yet what minimizes the rest (optimal brain surgeon; Frantar et
al., GPTQ, ICLR 2023, algorithm 1):

    H⁻¹ = UᵀU, U upper triangular      e_i = (w_i − ŵ_i) / U_ii      w_j ← w_j − e_i · U_ij,  j > i

What the layer should yield is what the float layer yields of its own inputs, y = W·x_f + r_f with a
residual r_f. On the quantized network's inputs x and residual r the weight nearest to that is

    W* = W + Σ e·xᵀ · H⁻¹      e = y − (W·x + r)

and as the errors add, rounding W* in place of W is all (the aim of GPTAQ: Li et al., ICML 2025,
which corrects column by column). Where the bias may move it takes the mean of what is left, so
that H and Σ e·xᵀ are those of the deviations from the means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.spec import QParams

__all__ = ["ColumnGrid", "Columns", "Moments", "Operands", "round_columns"]

Operands = tuple[Tensor, Tensor | None]
"""What a layer reads: its input, and the residual that it adds."""

# Inputs for each column of the Hessian. What a layer makes up for is a regression on them:
# ResNet-20 has 10.3 dB at W2A4 and 14.9 at W4A4 with 8 rows a column, 11.0 and 15.8 with 32
# (training images, 1,024 to calibrate and 976 others). Products for a wide Hessian are bounded.
_ROWS_A_COLUMN = 32
_FEWEST_ROWS_A_COLUMN = 8
_MOST_PRODUCTS = 4e11
_FEWEST_ROWS = 16384
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


@dataclass(frozen=True)
class Moments:
    """What a layer reads, and how far it is from what it should yield; float32.

    Attributes:
        count: how many rows were seen.
        hessian: Σ x·xᵀ, ``[groups, columns, columns]``.
        mean: of x, ``[groups, columns, 1]``.
        beyond: Σ e·xᵀ, ``[groups, rows, columns]``; zeros without a float network.
        shift: the mean of e, ``[groups, rows, 1]``.
    """

    count: int
    hessian: Tensor
    mean: Tensor
    beyond: Tensor
    shift: Tensor

    def centred(self) -> Moments:
        """Those of the deviations from the means; `mean` and `shift` stay."""
        weighted = self.count * self.mean.transpose(1, 2)
        return replace(
            self,
            hessian=self.hessian - self.mean * weighted,
            beyond=self.beyond - self.shift * weighted,
        )

    def best_weight(self, weight: Tensor, damping: float) -> Tensor:
        """W* of the module's text, with the Hessian damped; `weight` where nothing is solved."""
        if not bool(self.beyond.any()):
            return weight
        damped = self.hessian.double()
        diagonal = damped.diagonal(dim1=1, dim2=2)
        diagonal += damping * diagonal.mean(1, keepdim=True).clamp(min=torch.finfo().tiny)
        factor, info = torch.linalg.cholesky_ex(damped)
        if bool(info.any()):
            return weight
        moved = torch.cholesky_solve(self.beyond.double().transpose(1, 2), factor)
        best = weight + moved.transpose(1, 2).float()
        return best if bool(torch.isfinite(best).all()) else weight


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

    def join_rows(self, values: Tensor) -> Tensor:
        """One value for each output, [outputs], of those of its matrices ``[groups, rows, 1]``."""
        return values.sum(0).flatten() if self.linear else values.flatten()

    def moments(self, batches: Iterable[tuple[Operands, Operands | None]], images: int) -> Moments:
        """Of what the layer reads, and of what it reads in the float network, batch by batch.

        Of large feature maps as many positions as the Hessian's size calls for.
        """
        weight = self.split(self.layer.weight.detach())
        share = max(_FEWEST_ROWS_A_COLUMN, _MOST_PRODUCTS / self.columns**3)
        rows_wanted = int(min(_ROWS_A_COLUMN, share) * self.columns)
        wanted = -(-max(rows_wanted, _FEWEST_ROWS) // images)
        generator = torch.Generator().manual_seed(_SEED)
        hessian = torch.zeros(self.groups, self.columns, self.columns)
        total = torch.zeros(self.groups, self.columns, 1)
        beyond, shift = torch.zeros_like(weight), torch.zeros_like(weight[:, :, :1])
        count = 0
        for (x, residual), float_ in batches:
            chosen = _choose(math.prod(self._positions(x)), wanted, generator)
            rows = self._rows(x, chosen)
            count += rows.shape[2]
            total += rows.sum(2, keepdim=True)
            for start in range(0, self.columns, _STRIPE):
                # The lower half is the upper one, mirrored.
                stripe = slice(start, start + _STRIPE)
                hessian[:, stripe, start:].baddbmm_(
                    rows[:, stripe], rows[:, start:].transpose(1, 2)
                )
            if float_ is None:
                continue
            error = torch.bmm(weight, self._rows(float_[0], chosen) - rows)
            if residual is not None and float_[1] is not None:
                error += self._added(float_[1] - residual, x, chosen)
            beyond.baddbmm_(error, rows.transpose(1, 2))
            shift += error.sum(2, keepdim=True)
        hessian = hessian.triu().add_(hessian.triu(1).transpose(1, 2))
        return Moments(count, hessian, total / count, beyond, shift / count)

    def _positions(self, x: Tensor) -> tuple[int, ...]:
        """At how many places the layer is applied to each image, by dimension."""
        if self.linear:
            return (math.prod(x.shape[1:-1]),)
        layer, dims = self.layer, len(self.shape) - 2
        padding = layer._reversed_padding_repeated_twice
        return tuple(
            (size + padding[-2 * d - 2] + padding[-2 * d - 1] - gap * (kernel - 1) - 1) // step + 1
            for d, (size, kernel, step, gap) in enumerate(
                zip(x.shape[-dims:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
            )
        )

    def _rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the columns see at the chosen places, float32 ``[groups, columns, rows]``."""
        return self._tokens(x, chosen) if self.linear else self._patches(x, chosen)

    def _added(self, residual: Tensor, x: Tensor, chosen: Tensor) -> Tensor | float:
        """A residual at the chosen places, or 0 where it is no value of the output's shape."""
        positions, outputs = math.prod(self._positions(x)), self.shape[0]
        images = residual.numel() // (positions * outputs)
        if residual.numel() != images * positions * outputs or (self.linear and self.groups > 1):
            return 0.0
        if self.linear:
            taken = residual.reshape(images, positions, outputs)[:, chosen]
            return taken.reshape(1, -1, outputs).transpose(1, 2).float()
        taken = residual.reshape(images, self.groups, -1, positions)[..., chosen]
        return taken.permute(1, 2, 0, 3).flatten(2).float()

    def _tokens(self, x: Tensor, chosen: Tensor) -> Tensor:
        x = x.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])[:, chosen]
        return x.reshape(-1, self.groups, self.columns).permute(1, 2, 0).float()

    def _patches(self, x: Tensor, chosen: Tensor) -> Tensor:
        layer, dims = self.layer, len(self.shape) - 2
        x = x if x.dim() == dims + 2 else x.unsqueeze(0)
        counts = self._positions(x)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        places, offsets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        for size, count, kernel, step, gap in zip(
            x.shape[2:], counts, layer.kernel_size, layer.stride, layer.dilation, strict=True
        ):
            places = (places[:, None] * size + torch.arange(count) * step).flatten()
            offsets = (offsets[:, None] * size + torch.arange(kernel) * gap).flatten()
        flat = x.flatten(2)
        taken = flat[:, :, (offsets[:, None] + places[chosen]).flatten()]
        taken = taken.view(len(x), self.groups, -1, len(offsets), len(chosen))
        return taken.permute(1, 2, 3, 0, 4).reshape(self.groups, self.columns, -1).float()


def _splits(width: int, pieces: int) -> bool:
    return width % pieces == 0 and width // pieces <= _WIDEST


def _choose(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    if wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
