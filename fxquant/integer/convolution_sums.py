"""The sums of a convolution, exact in whatever type is fastest.

`exact_matmul_dtype` proves that every partial sum fits the type; what remains is to see that torch
computes plain sums:

- A matrix product is one, and float64 convolutions run as matrix products of unfolded inputs.
- A float32 convolution could run as Winograd (NNPACK, and oneDNN on some processors), whose
  intermediate values are no partial sums. So it goes to oneDNN on x86 by name: that function asks
  for ``convolution_direct``, and all that x86 has under this name are plain sums.
"""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.integer.bounds import (
    FLOAT32_LIMIT,
    INT32_LIMIT,
    Bound,
    checked_bound,
    shifted_weight,
    weight_reach,
)
from fxquant.integer.linear import exact_matmul_dtype
from fxquant.integer.rounding import centered_as

# Codes of some samples [n, C, ...] -> their exact sums.
Compute = Callable[[Tensor], Tensor]

_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_HAS_PLAIN_FLOAT32 = _HAS_ONEDNN and platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Geometry:
    """The hyper-parameters of a convolution, one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """The spatial size of the output."""
        return tuple(
            (length + 2 * pad - step * (taps - 1) - 1) // hop + 1
            for length, taps, hop, pad, step in zip(
                size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )


@dataclass(frozen=True, eq=False)
class WindowSums:
    """``Σ (q_x − z_x)(q_w − z_w)`` over each window, in the fastest exact way.

    ``compute`` may add the bias too; ``bias_left`` is the one that is still to be added.
    ``outputs`` counts the sums of one sample.
    """

    compute: Compute
    bound: Bound
    bias_left: Tensor | None
    outputs: int

    @classmethod
    def of(
        cls,
        operator: str,
        x: Tensor,
        x_zero_point: int,
        weight: Tensor,
        weight_zero_point: Tensor | None,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> WindowSums:
        """Raises CompileError where an accumulator could leave its range."""
        shifted = shifted_weight(weight, weight_zero_point)
        bound = checked_bound(operator, x.dtype, x_zero_point, weight_reach(shifted), bias)
        size = geometry.output_size(x.shape[2 - weight.dim() :], weight.shape[2:])
        compute, bias_left = convolution_sums(shifted, bound, bias, x, x_zero_point, geometry)
        return cls(compute, bound, bias_left, weight.shape[0] * math.prod(size))


def convolution_sums(
    shifted: Tensor,
    bound: Bound,
    bias: Tensor | None,
    x: Tensor,
    x_zero_point: int,
    geometry: Geometry,
) -> tuple[Compute, Tensor | None]:
    """The fastest exact way for these operands, and the bias if it is still to be added."""
    carrier = exact_matmul_dtype(bound, x.dtype, x_zero_point, shifted)
    direct = carrier == torch.float32 and _HAS_PLAIN_FLOAT32 and x.numel() > 0
    one_tap = geometry.groups == 1 and not any(geometry.padding) and set(shifted.shape[2:]) == {1}
    if one_tap and (x.is_contiguous() or not direct):
        return _by_matrix(shifted.to(carrier), x_zero_point, geometry), bias
    if direct:
        included = bias if bound.total < FLOAT32_LIMIT else None
        compute = _by_onednn(shifted.to(carrier), included, x_zero_point, geometry)
        return compute, None if included is bias else bias
    if geometry.groups > 1 and shifted.shape[1] == 1:
        integers = torch.int32 if bound.total <= INT32_LIMIT else torch.int64
        return _by_taps(shifted.to(integers), x_zero_point, geometry), bias
    return _by_unfolding(shifted.to(torch.float64), x_zero_point, geometry), bias


def _by_matrix(weight: Tensor, x_zero_point: int, geometry: Geometry) -> Compute:
    """A kernel of one tap is a matrix product with the strided input's pixels."""
    matrix = weight.flatten(1)
    pixels = (slice(None), slice(None), *(slice(None, None, hop) for hop in geometry.stride))

    def compute(samples: Tensor) -> Tensor:
        taken = samples[pixels]
        wide = centered_as(taken, x_zero_point, weight.dtype).flatten(2)
        # Autocast would give the sums in bfloat16, rounded to 8 bits.
        with torch.autocast("cpu", enabled=False):
            sums = matrix @ wide
        return sums.reshape(*sums.shape[:2], *taken.shape[2:])

    return compute


def _by_onednn(
    weight: Tensor, bias: Tensor | None, x_zero_point: int, geometry: Geometry
) -> Compute:
    """Float32; one dimension runs as two."""
    flat = weight.dim() == 3
    one, none = ((1,), (0,)) if flat else ((), ())
    kernel = weight.unsqueeze(2) if flat else weight
    summand = None if bias is None else bias.to(torch.float32)

    def compute(samples: Tensor) -> Tensor:
        wide = centered_as(samples, x_zero_point, torch.float32)
        sums: Tensor = torch.ops.aten.mkldnn_convolution.default(
            wide.unsqueeze(2) if flat else wide,
            kernel,
            summand,
            none + geometry.padding,
            one + geometry.stride,
            one + geometry.dilation,
            geometry.groups,
        )
        return sums.squeeze(2) if flat else sums

    return compute


def _by_unfolding(weight: Tensor, x_zero_point: int, geometry: Geometry) -> Compute:
    """Float64, one sample at a time: the unfolded input of one image stays in the cache."""
    function = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]

    def compute(samples: Tensor) -> Tensor:
        wide = centered_as(samples.contiguous(), x_zero_point, torch.float64)
        parts = [
            function(
                sample,
                weight,
                None,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                geometry.groups,
            )
            for sample in (torch.split(wide, 1) if wide.shape[0] else (wide,))
        ]
        return torch.cat(parts)

    return compute


def _by_taps(weight: Tensor, x_zero_point: int, geometry: Geometry) -> Compute:
    """Integers, one input channel for each output channel: whole planes, tap by tap."""
    kernel = weight.shape[2:]
    taps = weight.flatten(2).unbind(2)
    both_sides = [pad for pad in reversed(geometry.padding) for _ in range(2)]

    def compute(samples: Tensor) -> Tensor:
        wide = F.pad(centered_as(samples, x_zero_point, weight.dtype), both_sides)
        wide = wide.repeat_interleave(weight.shape[0] // samples.shape[1], dim=1)
        extents = geometry.output_size(samples.shape[2:], kernel)
        sums = wide.new_zeros((samples.shape[0], weight.shape[0], *extents))
        for tap, position in zip(
            taps, itertools.product(*(range(size) for size in kernel)), strict=True
        ):
            window = wide
            for axis, index in enumerate(position):
                start, hop = index * geometry.dilation[axis], geometry.stride[axis]
                stop = start + hop * (extents[axis] - 1) + 1
                window = window[(slice(None),) * (2 + axis) + (slice(start, stop, hop),)]
            sums.addcmul_(window, tap.reshape(-1, *[1] * len(kernel)))
        return sums

    return compute
