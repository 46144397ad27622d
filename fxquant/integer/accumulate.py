"""Sums of products and plain sums as integers, for graphs that hold nothing else.

The sums are those of `linear`, `conv` and `mean`. They are int32 for 8-bit codes and int64 as soon
as a code has 16 bits; `rescale` takes them back to codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.integer.bounds import accumulator_dtype, check_codes
from fxquant.integer.convolution import over_samples
from fxquant.integer.convolution_sums import Geometry, WindowSums
from fxquant.integer.linear import RowSums
from fxquant.integer.rounding import along_dimension


def linear_accumulate(
    x: Tensor,
    x_zero_point: int,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``a = Σ (q_x − z_x)(q_w − z_w) + b_q`` over the last dimension, as int32 or int64.

    ``x`` is [..., K], ``weight`` int8 [O, K], ``bias`` int32 or int64 [O]; the result is [..., O],
    int64 where ``x`` is int16. Raises CompileError where an accumulator could leave its range.
    """
    check_codes("linear_accumulate", x)
    sums = RowSums.of("linear_accumulate", x, x_zero_point, weight, weight_zero_point, bias)
    wide = accumulator_dtype(x.dtype)

    def finish(products: Tensor, _: Tensor | None) -> Tensor:
        return _with_bias(products, bias, -1, wide)

    return sums.over_rows(x, None, finish)


def conv_accumulate(
    x: Tensor,
    x_zero_point: int,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``a = Σ (q_x − z_x)(q_w − z_w) + b_q`` over each window, as int32 or int64.

    ``x`` is [N, I, ...] or [I, ...], ``weight`` int8 [O, I/groups, ...] of rank 3, 4 or 5, ``bias``
    int32 or int64 [O]. Padding pads with ``x_zero_point``. The result is int64 where ``x`` is
    int16. Raises CompileError where an accumulator could leave its range.
    """
    check_codes("conv_accumulate", x)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    sums = WindowSums.of(
        "conv_accumulate", x, x_zero_point, weight, weight_zero_point, bias, geometry
    )
    wide, axis = accumulator_dtype(x.dtype), 1 - weight.dim()

    def finish(products: Tensor, _: Tensor | None) -> Tensor:
        return _with_bias(products, sums.bias_left, axis, wide)

    return over_samples(x, None, weight.dim(), sums.outputs, sums.compute, finish)


def sum_accumulate(x: Tensor, x_zero_point: int, dim: Sequence[int], keepdim: bool) -> Tensor:
    """``Σ (q − z)`` as int64 over the dimensions ``dim``, all of them if empty: a mean's sum."""
    check_codes("sum_accumulate", x)
    # The sum of an integer tensor is an int64.
    axes = tuple(dim) or tuple(range(x.dim()))
    return x.sum(axes, keepdim=keepdim) - x_zero_point * math.prod(x.shape[axis] for axis in axes)


def _with_bias(sums: Tensor, bias: Tensor | None, axis: int, dtype: torch.dtype) -> Tensor:
    integers = sums.to(dtype)
    if bias is None:
        return integers
    return integers.add_(along_dimension(bias.to(dtype), sums.dim(), axis))
